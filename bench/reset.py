"""`make bench-reset`: resets of a Debian guest with its root file system mounted read-write, beside `virsh
snapshot-revert` of the same VM in the same run, in turn; JSON as all benchmarks.

What the stop-watch is: a reset's starts when the guest is paused first, which is when its service is lost, and ends
when QEMU tells that it goes on (its event RESUME; `full_ms`), and again at its first answer to a new nonce
(`full_first_life`). virsh takes the service away for its whole command, so `full_vs_virsh` is that command against the
pause, and `full_call_vs_virsh` that command against the whole call of the verb up to there, in a process that has its
engine open, as a daemon has. `command_ms` is the hvctl command as a user types it, Python's start included.
`disk_vs_virsh` is likewise of the time that the disk was away, beside `disk_call_ms`. The floor is the pause of a reset
that follows right after another one, without its two passes over RAM: stop, load of the device state with nothing
dirty, go on. Ratios are medians of pairs.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from report import say, spread, write
from resetlab import DISK_WORK, HVCTL, SNAPSHOT, VIRSH_SNAPSHOT, WORK, Figures, Guest, guest, milliseconds, run

from hvctl.engine.operate import Engine
from hvctl.engine.runtime import open_engine
from hvctl.settings import load_settings

PAGE = 4096
DIRTY = (1024, 4096, 16384)
"""Pages that the guest writes for the figures per page."""
MUCH = "while :; do head -c 2M /dev/urandom > /dev/shm/much; sleep 0.2; done"


class Samples:
    """Named rows of figures, one of each in every round, with the load of the host at that moment."""

    def __init__(self) -> None:
        self.rows: dict[str, list[float]] = {}
        self.loads: list[float] = []

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.rows.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self.rows[name])

    def ratio(self, above: str, below: str) -> float:
        """The median of the pairs' ratios."""
        return statistics.median(a / b for a, b in zip(self.rows[above], self.rows[below], strict=True))

    def cases(self) -> list[dict[str, Any]]:
        load = {"load_min": min(self.loads), "load_median": statistics.median(self.loads), "load_max": max(self.loads)}
        return [{"case": name, **spread(values), **load} for name, values in self.rows.items()]


def in_rounds(what: str, rounds: int, one: Callable[[Samples], str]) -> Samples:
    samples = Samples()
    for n in range(rounds):
        samples.loads.append(os.getloadavg()[0])
        said = one(samples)
        say(f"{what} {n + 1}/{rounds}: {said} (load {samples.loads[-1]:.1f})")
    return samples


def beside_virsh(small: Guest, large: Guest, rounds: int) -> tuple[Samples, str]:
    """Full, floor, disk, the large VM, virsh: each once in every round. virsh makes another QEMU process, so hvctl's
    snapshot is taken anew after it, outside of every stop-watch; the first reset after that touches pages that nobody
    has touched in the new process yet, and has figures of its own (`first_ms`)."""
    run("virsh", "snapshot-create-as", small.name, VIRSH_SNAPSHOT)
    trackers = set()

    def one(samples: Samples) -> str:
        small.take()
        first = dirty(small, WORK)
        full = dirty(small, WORK)
        floor = small.reset()
        for _ in range(2):  # the first one finds nothing prepared
            small.sh(DISK_WORK)
            away, call = small.reset_disk()
        big = dirty(large, WORK)
        small.sh(WORK)
        revert = milliseconds("virsh", "snapshot-revert", small.name, VIRSH_SNAPSHOT)
        small.ready()
        small.forget()
        trackers.update({full.tracker, big.tracker})
        samples.add(
            first_ms=first.paused,
            first_ram_ms=first.ram,
            full_ms=full.paused,
            full_call_ms=full.call,
            full_first_life_ms=full.life,
            full_ram_ms=full.ram,
            full_pages=full.pages,
            floor_ms=floor.paused - floor.ram,
            floor_pages=floor.pages,
            disk_away_ms=away,
            disk_call_ms=call,
            large_ms=big.paused,
            large_ram_ms=big.ram,
            large_pages=big.pages,
            virsh_ms=revert,
        )
        samples.add(**{f"full_step_{name}_ms": value for name, value in full.steps.items()})
        return f"full {full.paused:.1f} ms ({full.pages} pages), 4 GiB {big.paused:.1f} ms, virsh {revert:.0f} ms"

    samples = in_rounds("beside virsh", rounds, one)
    return samples, "+".join(sorted(trackers))


def dirty(vm: Guest, script: str) -> Figures:
    vm.sh(script)
    return vm.reset()


def per_page(vm: Guest, rounds: int) -> Samples:
    """Both passes over RAM by the number of pages that the guest wrote."""

    def one(samples: Samples) -> str:
        said = []
        for pages in DIRTY:
            done = dirty(vm, f"head -c {pages * PAGE} /dev/urandom > /dev/shm/bench")
            us = done.ram * 1000 / done.pages
            samples.add(**{f"us_per_page_{pages}": us, f"ram_ms_{pages}": done.ram, f"pages_{pages}": done.pages})
            said.append(f"{done.pages} pages {us:.2f} us")
        return ", ".join(said)

    return in_rounds("per page", rounds, one)


def snapshots_of(vm: Guest, rounds: int) -> Samples:
    """A guest that writes some MB each second while its first snapshot is taken; the pause to arm and the one to save
    together."""
    vm.start(MUCH)

    def one(samples: Samples) -> str:
        done = vm.take("pause")
        vm.forget("pause")
        paused = done.result["paused"] * 1000
        samples.add(snapshot_pause_ms=paused, snapshot_whole_ms=done.seconds * 1000)
        return f"paused {paused:.1f} ms of {done.seconds:.2f} s"

    return in_rounds("snapshots", rounds, one)


def commands(vm: Guest, rounds: int) -> Samples:
    def one(samples: Samples) -> str:
        vm.sh(WORK)
        samples.add(command_ms=(took := milliseconds(HVCTL, "reset", vm.name, "--to", SNAPSHOT)))
        return f"{took:.0f} ms"

    return in_rounds("commands", rounds, one)


def measure(engine: Engine, rounds: int) -> tuple[dict[str, float | str], list[dict[str, Any]]]:
    with ExitStack() as stack:
        say("starting a VM of 512 MiB and one of 4 GiB")
        small = stack.enter_context(guest(engine, "small", "512MiB"))
        large = stack.enter_context(guest(engine, "large", "4GiB"))
        large.take()
        pairs, tracker = beside_virsh(small, large, rounds)
        small.take()
        pages = per_page(small, rounds)
        whole = commands(small, rounds)
        missed = small.audit() + large.audit()
        large.forget()
        pauses = snapshots_of(large, rounds)
    summary: dict[str, float | str] = {
        "full_vs_virsh": pairs.ratio("virsh_ms", "full_ms"),
        "full_call_vs_virsh": pairs.ratio("virsh_ms", "full_call_ms"),
        "disk_vs_virsh": pairs.ratio("virsh_ms", "disk_away_ms"),
        "disk_call_vs_virsh": pairs.ratio("virsh_ms", "disk_call_ms"),
        "ram_4g_vs_512m": pairs.ratio("large_ms", "full_ms"),
        "us_per_dirty_page": pages.median(f"us_per_page_{DIRTY[1]}"),
        "full_vs_floor": pairs.ratio("full_ms", "floor_ms"),
        "snapshot_pause_ms_4g": pauses.median("snapshot_pause_ms"),
        "first_vs_virsh": pairs.ratio("virsh_ms", "first_ms"),
        "first_ms_p50": pairs.median("first_ms"),
        "full_ms_p50": pairs.median("full_ms"),
        "full_ms_p99": spread(pairs.rows["full_ms"])["p99"],
        "full_first_life_ms_p50": pairs.median("full_first_life_ms"),
        "full_call_ms_p50": pairs.median("full_call_ms"),
        "floor_ms_p50": pairs.median("floor_ms"),
        "disk_away_ms_p50": pairs.median("disk_away_ms"),
        "disk_call_ms_p50": pairs.median("disk_call_ms"),
        "command_ms_p50": whole.median("command_ms"),
        "virsh_ms_p50": pairs.median("virsh_ms"),
        "audit_missed_pages": missed,
        "load_median": statistics.median(pairs.loads),
        "tracker": tracker,
    }
    return summary, [case for samples in (pairs, pages, whole, pauses) for case in samples.cases()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="of each case; less than 20 is only to try it")
    rounds = parser.parse_args().rounds
    # So that the VMs go, too, when somebody ends this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with open_engine(load_settings()) as engine:
            summary, cases = measure(engine, rounds)
    except subprocess.CalledProcessError as e:
        raise SystemExit(f"bench: {e.cmd[0]} ended with status {e.returncode}: {e.stderr}") from e
    write("reset", summary, cases)


if __name__ == "__main__":
    main()
