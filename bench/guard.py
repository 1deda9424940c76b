"""`make bench-guard`: the same loads on two VMs at the same time, one of them guarded; JSON as all benchmarks.

The first load reads ever more into the guest's page cache, the second fills a scratch disk. Contention is counted from
outside of the guard: the time in which QEMU holds more of the host's memory than the VM's part (`resident_*`, looked at
four times a second), and the share of the time in which what the guest writes does not fit on its disk (`disk_*`, by
its own count of tries). `work_*` is how often each load came round.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from report import say, write
from resetlab import Guest, guest

from hvctl.engine.operate import Engine
from hvctl.engine.runtime import open_engine
from hvctl.model.guard import Allowed, GuardPolicy, Watch
from hvctl.operations import guard
from hvctl.settings import load_settings

MIB = 1 << 20
MEMORY, ROOM = "512MiB", 250 * MIB
KIND = ("--image", "micro", "--disk", "data:420MiB", "--disk", "scratch:64MiB")
EVERY, LOOK = 1.0, 0.25
"""Seconds between two looks of the guard, and of who counts."""
SNAPSHOT = "clean"

# The snapshot has of a disk what was written to it, not what its guest still has in memory.
PREPARE = """
until grep -q " /data " /proc/mounts; do sleep 0.1; done
dd if=/dev/urandom of=/run/piece bs=1M count=1
dd if=/dev/zero of=/data/holes bs=1M seek=400 count=0
/sbin/mke2fs -q -t ext4 -m 0 /dev/vdb && mkdir /scratch && mount /dev/vdb /scratch && mkdir /scratch/work && sync
"""
# Holes are read as fast as the guest can, and are in its page cache all the same.
LEAK = "dd if=/data/holes of=/dev/null bs=1M skip=$((i * 5 % 395)) count=5 && echo >> /run/leak.done; sleep 0.5"
# The folder is on the disk, so that nothing is written while it is not mounted.
FILL = """if dd if=/run/piece of=/scratch/work/$i bs=1M conv=fsync; then echo >> /run/fill.done
elif [ -d /scratch/work ]; then echo >> /run/fill.full; fi; sleep 0.4"""
RELEASE = "i=0; until umount /scratch; do i=$((i + 1)); [ $i -lt 100 ] || exit 1; sleep 0.1; done"
SCRATCH = Allowed("disk:scratch", 0.0, before=(("/bin/sh", "-c", RELEASE),), after=(("mount", "/dev/vdb", "/scratch"),))


def policy(resident: int) -> Watch:
    rules = GuardPolicy(
        "the page cache goes back, a scratch disk that fills is emptied", (Allowed("cache"), SCRATCH), SNAPSHOT,
        threshold=1.0, looks=1, horizon=20.0, window=20.0, cool_down=3.0, resident=resident,
    )  # fmt: skip
    return Watch("bench", rules)


def resident(pid: int) -> int:
    """Bytes, as the host's kernel has it."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


@contextmanager
def counted(pids: dict[str, int], limits: dict[str, int]) -> Iterator[dict[str, float]]:
    """By VM, the seconds in which it held more than its limit, while the block runs."""
    over, ended = dict.fromkeys(pids, 0.0), threading.Event()

    def count() -> None:
        last = time.monotonic()
        while not ended.wait(LOOK):
            now = time.monotonic()
            for name, pid in pids.items():
                over[name] += now - last if resident(pid) >= limits[name] else 0.0
            last = now

    thread = threading.Thread(target=count)
    thread.start()
    try:
        yield over
    finally:
        ended.set()
        thread.join()


def under(engine: Engine, pair: tuple[Guest, Guest], load: str, script: str, seconds: float) -> None:
    """Run a load on both while the guard looks."""
    for vm in pair:
        vm.sh(f"cat > /run/{load} << 'END'\ni=0\nwhile :; do\n{script}\ni=$((i + 1))\ndone\nEND\n"
              f"sh /run/{load} > /dev/null 2>&1 & echo $! > /run/{load}.pid")  # fmt: skip
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        looked = time.monotonic()
        done = guard.cycle(engine)
        if "nothing" not in done:
            say(f"{load}: {looked - began:.0f} s: {done}")
        time.sleep(max(0.0, EVERY - (time.monotonic() - looked)))
    for vm in pair:
        vm.sh(f"kill $(cat /run/{load}.pid)")


def lines(vm: Guest, file: str) -> int:
    return int(vm.sh(f"cat /run/{file} 2> /dev/null | wc -l"))


def measure(engine: Engine, seconds: float) -> tuple[dict[str, float | str], list[dict[str, Any]]]:
    with ExitStack() as stack:
        say("starting two VMs of 512 MiB")
        guarded, alone = (stack.enter_context(guest(engine, label, MEMORY, KIND)) for label in ("with", "without"))
        vms = {"with": guarded, "without": alone}
        for vm in vms.values():
            vm.sh(PREPARE)
        guarded.take(SNAPSHOT)
        seen = {how: engine.host.domains.get(vm.uuid).process for how, vm in vms.items()}
        pids = {how: process.pid for how, process in seen.items() if process}
        limits = {how: resident(pid) + ROOM for how, pid in pids.items()}
        guard.arm(engine, guarded.uuid, policy(limits["with"]))
        with counted(pids, limits) as over:
            under(engine, (guarded, alone), "leak", LEAK, seconds)
        under(engine, (guarded, alone), "fill", FILL, seconds)
        work = {(load, how): lines(vm, f"{load}.done") for load in ("leak", "fill") for how, vm in vms.items()}
        failed = {how: lines(vm, "fill.full") for how, vm in vms.items()}
        rows = engine.store.guards.of_vm(engine.facts.name, guarded.uuid)
    full = {how: seconds * failed[how] / max(1, failed[how] + work["fill", how]) for how in vms}
    summary: dict[str, float | str] = {f"contention_seconds_{how}": over[how] + full[how] for how in vms}
    for how in vms:
        summary |= {f"resident_seconds_{how}": over[how], f"disk_seconds_{how}": full[how]}
        summary |= {f"work_{load}_{how}": work[load, how] for load in ("leak", "fill")}
    acted = [d.decision.chosen.part for d in rows if d.decision.chosen and d.outcome == "done"]
    summary |= {"resets_cache": acted.count("cache"), "resets_disk": acted.count(SCRATCH.part)}
    summary |= {"seconds_each": seconds, "looks": sum(d.looks for d in rows), "rows": len(rows)}
    cases: list[dict[str, Any]] = [
        {"case": f"d{d.id}", "part": d.decision.chosen.part, "outcome": d.outcome, "because": d.decision.reason}
        for d in reversed(rows) if d.decision.chosen
    ]  # fmt: skip
    return summary, cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=75.0, help="of each load")
    seconds = parser.parse_args().seconds
    # So that the VMs go, too, when somebody ends this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with open_engine(load_settings()) as engine:
        summary, cases = measure(engine, seconds)
    write("guard", summary, cases)


if __name__ == "__main__":
    main()
