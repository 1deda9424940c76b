"""`make bench-collect`: what measuring costs. The CPU share of the daemon for 1,000 and 10,000 VMs of a fake host, of
the daemon and of libvirtd for 20 real micro VMs, and the size of the database for 100 VMs over 90 days."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from report import say, write

from hvctl.adapters.fake import FakeWorld, open_fake
from hvctl.adapters.images import imagestore
from hvctl.adapters.store.bulk import insert_rows
from hvctl.adapters.store.database import Database
from hvctl.adapters.store.sampletables import RAW_SAMPLE, ROLLED_SAMPLE
from hvctl.adapters.store.store import Store
from hvctl.decide.rates import used
from hvctl.decide.rollup import SLOT, roll_up
from hvctl.engine.collect import Collector
from hvctl.engine.operate import Engine
from hvctl.engine.runtime import open_engine
from hvctl.errors import HvctlError
from hvctl.jobs.catalog import JOBS, Node, perform
from hvctl.model.job import RunState
from hvctl.model.meter import DiskCounters, NicCounters, Reading, VmReading
from hvctl.model.sample import STORED
from hvctl.operations import collect
from hvctl.operations import vm as vms
from hvctl.settings import Settings

HVCTL = [sys.executable, "-m", "hvctl"]
CYCLE = 10.0
PER_SLOT = int(SLOT / CYCLE)
START = 1_800_000_000
MIB = 1 << 20
TICK = os.sysconf("SC_CLK_TCK")


# --- many VMs on a fake host


class BusyMeter:
    """The fake host's VMs at work: each reading is a cycle later than the one before. What it costs is counted apart,
    since it stands for libvirt's answer and not for hvctl's work on it."""

    def __init__(self, first: Reading) -> None:
        self._first = first
        self._cycle = 0
        self.seconds = 0.0

    def read(self) -> Reading:
        began = time.process_time()
        self._cycle += 1
        n, first = self._cycle, self._first
        found = tuple(_worked(vm, n * (1 + i % 7)) for i, vm in enumerate(first.vms))
        reading = first._replace(at=START + n * CYCLE, clock=n * CYCLE, vms=found)
        self.seconds += time.process_time() - began
        return reading

    def dirty_rate(self, uuid: str, seconds: int) -> int:
        raise NotImplementedError

    def lacks(self) -> tuple[str, ...]:
        return ()

    def close(self) -> None: ...


def _worked(vm: VmReading, n: int) -> VmReading:
    disk = DiskCounters("vda", 31 * n, 57 * n, 123_457 * n, 234_567 * n)
    nic = NicCounters("tap", 34_567 * n, 23_456 * n, 321 * n, 234 * n)
    return vm._replace(
        uptime=n * 10.0,
        cpu=1_234_567_891 * n,
        vcpu_times=((0, 1_034_567_891 * n),),
        steal=34_567_891 * n,
        disks=(disk,),
        nics=(nic,),
    )


def many(count: int, slots: int) -> dict[str, Any]:
    """Cycles without waiting between them, through the jobs as the daemon runs them, with a real SQLite file."""
    with _folder() as folder:
        world = FakeWorld(folder / "world.json")
        world.add_vms(f"vm-{i}" for i in range(count))
        host = open_fake(world.uri)
        meter = BusyMeter(host.meter.read()._replace(took=0.0))
        settings = Settings(uri=world.uri, state_dir=str(folder), run_dir=str(folder / "run"))
        with Store(settings.database) as store:
            store.migrate()
            engine = Engine(settings, replace(host, meter=meter), store)
            node = Node(engine, Collector(engine))
            _done(perform(JOBS["collect"], node, "bench"))
            meter.seconds, rolled = 0.0, 0.0
            began, wall = time.process_time(), time.perf_counter()
            for cycle in range(slots * PER_SLOT):
                _done(perform(JOBS["collect"], node, "bench"))
                if (cycle + 2) % PER_SLOT == 0:
                    before = time.process_time()
                    # As its job does, at the time that the readings are of.
                    collect.roll_up(engine, START + (cycle + 2) * CYCLE + 30)
                    rolled += time.process_time() - before
            whole, passed = time.process_time() - began, time.perf_counter() - wall
    cycles = slots * PER_SLOT
    cpu = (whole - meter.seconds) / cycles
    say(
        f"{count} VMs: {cpu * 1000:.1f} ms of CPU a cycle (roll-up {rolled / cycles * 1000:.1f} of it; the fake's own "
        f"reading {meter.seconds / cycles * 1000:.1f} beside it), {passed / cycles * 1000:.0f} ms in all"
    )
    return {
        "case": f"fake_{count}_vms",
        "cycles": cycles,
        "core_share": cpu / CYCLE,
        "cpu_ms_per_cycle": cpu * 1000,
        "roll_up_ms_per_cycle": rolled / cycles * 1000,
        "fake_reading_ms_per_cycle": meter.seconds / cycles * 1000,
        "elapsed_ms_per_cycle": passed / cycles * 1000,
    }


def _done(run: Any) -> None:
    if run.state is not RunState.DONE or "kept" in run.detail:
        raise SystemExit(f"bench: {run.job} {run.state}: {run.detail}")


# --- real VMs


def real(count: int, seconds: float) -> dict[str, Any]:
    """A daemon as a process of its own beside running micro VMs, with a database and locks of its own. Only what it
    measures is measured: it acts on nothing."""
    with contextlib.ExitStack() as made:
        folder = made.enter_context(_folder())
        ours = {"HVCTL_DATABASE_URL": f"sqlite:///{folder}/hvctl.db", "HVCTL_RUN_DIR": str(folder / "run")}
        environment = {**os.environ, **ours}
        settings = Settings(
            database_url=ours["HVCTL_DATABASE_URL"],
            run_dir=ours["HVCTL_RUN_DIR"],
            cpu_overcommit=1000.0,
            memory_overcommit=1000.0,
            libvirt_deadline=60.0,  # twenty guests boot beside it
        )
        imagestore.find(settings, "micro")
        engine = made.enter_context(open_engine(settings))
        for i in range(count):
            made.callback(_remove, engine, f"bench-{os.getpid()}-{i}")
            vms.create(engine, _micro(f"bench-{os.getpid()}-{i}"))
            say(f"real VM {i + 1} of {count}")
        _settle(engine, f"bench-{os.getpid()}-")
        subprocess.run([*HVCTL, "-q", "job", "pause"], env=environment, check=True)
        looks, before_looks = 20, time.process_time()
        for _ in range(looks):
            seen = engine.host.meter.read()
        look = (time.process_time() - before_looks) / looks / len(seen.vms)
        libvirtd = _libvirtd()
        idle = _share(libvirtd, seconds)
        daemon = subprocess.Popen([*HVCTL, "-q", "node", "run"], env=environment)
        try:
            time.sleep(2 * CYCLE)
            before = _cpu(daemon.pid), _cpu(libvirtd), time.monotonic()
            time.sleep(seconds)
            passed = time.monotonic() - before[2]
            shares = [(_cpu(pid) - cpu) / passed for pid, cpu in ((daemon.pid, before[0]), (libvirtd, before[1]))]
        finally:
            daemon.terminate()
            status = daemon.wait(timeout=60)
        found = engine.store.samples.latest(engine.facts.name, 0)
    mine = {s.uuid for s in found if s.name.startswith(f"bench-{os.getpid()}-")}
    if status or len(mine) != count:
        raise SystemExit(f"bench: the daemon ended with {status} and has samples of {len(mine)} of {count} VMs")
    say(
        f"{count} real VMs: daemon {shares[0]:.4f} of a core, libvirtd {shares[1]:.4f} (without it {idle:.4f}); "
        f"a look costs hvctl {look * 1e6:.0f} us a VM"
    )
    return {
        "case": f"real_{count}_vms",
        "seconds": passed,
        "daemon": shares[0],
        "libvirtd": shares[1],
        "libvirtd_without_daemon": idle,
        "look_us_per_vm": look * 1e6,
        "other_vms": len({s.uuid for s in found}) - count,
    }


def _settle(engine: Engine, prefix: str) -> None:
    """Until the guests have booted and use little."""
    until = time.monotonic() + 600
    before = engine.host.meter.read()
    while time.monotonic() < until:
        time.sleep(CYCLE)
        now = engine.host.meter.read()
        busy = [s for s in used(before, now, float("inf")).samples if s.name.startswith(prefix) and (s.cpu or 0) > 0.1]
        before = now
        if not busy:
            return
    raise SystemExit("bench: the guests do not come to rest")


def _micro(name: str) -> vms.NewVm:
    return vms.NewVm(
        name=name,
        image="micro",
        vcpus=1,
        max_vcpus=1,
        memory=128 * MIB,
        max_memory=128 * MIB,
        disks=None,
        bridges=(),
        labels={},
        start=True,
    )


def _remove(engine: Engine, name: str) -> None:
    try:
        vms.delete(engine, name, force=True)
    except HvctlError as e:
        say(f"{name} is left behind: {e.message}")


def _libvirtd() -> int:
    return int(Path("/run/libvirtd.pid").read_text())


def _cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def _share(pid: int, seconds: float) -> float:
    before, began = _cpu(pid), time.monotonic()
    time.sleep(seconds)
    return (_cpu(pid) - before) / (time.monotonic() - began)


# --- the database


def size(count: int, days: int, hours: int) -> dict[str, Any]:
    """MiB of a database with rows as real VMs give them: half of them nearly idle, no hardware counters."""
    chance = random.Random(4)
    raw = [_row(chance) for _ in range(2000)]
    rolled = []
    for i in range(500):
        picked = chance.sample(raw, PER_SLOT)
        rolled += [r[2:] for r in roll_up((60 + k * 8, 1, *row) for k, row in enumerate(picked))]
        if i % 2:
            rolled += [r[2:] for r in roll_up((60 + k * 8, 1, *_idle()) for k in range(PER_SLOT))]
    with _folder() as folder:
        file = folder / "hvctl.db"
        with Store(f"sqlite:///{file}") as store:
            store.migrate()
        empty = file.stat().st_size
        database = Database(f"sqlite:///{file}")
        sizes: list[float] = []
        for table, rows, step, slots in (
            (ROLLED_SAMPLE, rolled, SLOT, days * 86400 // SLOT),
            (RAW_SAMPLE, raw, int(CYCLE), int(hours * 3600 / CYCLE)),
        ):
            for first in range(0, slots, 500):
                with database.transaction(write=True) as connection:
                    batch = [
                        (START + slot * step, vm, *rows[chance.randrange(len(rows))])
                        for slot in range(first, min(first + 500, slots))
                        for vm in range(1, count + 1)
                    ]
                    insert_rows(connection, table, batch)
            sizes.append((file.stat().st_size - empty) / MIB - sum(sizes))
        database.close()
    say(f"{count} VMs: {days} days of 5 minutes {sizes[0]:.0f} MiB, {hours} h of {CYCLE:g} s {sizes[1]:.0f} MiB")
    return {"case": "database", "vms": count, "rolled_mib": sizes[0], "raw_mib": sizes[1], "mib": sum(sizes)}


def _row(chance: random.Random) -> tuple[float | None, ...]:
    """A raw sample without time and VM: one that works, or one that is nearly idle."""
    if chance.random() < 0.5:
        return _idle()
    values: dict[str, float | None] = dict.fromkeys(STORED)
    values |= {"seconds": 10.001, "uptime": chance.randrange(10**6), "vcpus": 2, "memory": 1 << 30}
    values |= {n: round(chance.random(), 4) for n in ("cpu", "cpu_busiest", "steal", "stall_cpu", "stall_io")}
    values |= {n: chance.randrange(1 << 30) // 4096 * 4096 for n in STORED if n.startswith("memory_") or n == "rss"}
    values |= {n: round(chance.random() * 90, 2) for n in ("disk_reads", "disk_writes")}
    values |= {n: chance.randrange(10**6) for n in STORED if n.endswith("_bytes")}
    values |= {n: chance.randrange(1000) for n in STORED if n.endswith("_packets")}
    values |= {"stall_memory": 0.0, "connections": chance.randrange(100)}
    return tuple(values[n] for n in STORED)


def _idle() -> tuple[float | None, ...]:
    values: dict[str, float | None] = dict.fromkeys(STORED, 0.0)
    values |= {"seconds": 10.001, "uptime": 54321, "vcpus": 1, "memory": 1 << 28, "cpu": 0.0123, "cpu_busiest": 0.0101}
    values |= {n: 123 << 20 for n in STORED if n.startswith("memory_") or n == "rss"}
    values |= dict.fromkeys(("cycles", "instructions", "cache_misses"))
    return tuple(values[n] for n in STORED)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """On a disk, since a database is what is measured."""
    folder = Path(tempfile.mkdtemp(prefix="hvctl-bench-", dir="/var/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=int, default=20, help="real VMs; 0 leaves them out")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long the real daemon is watched")
    parser.add_argument("--days", type=int, default=90, help="days of the database; 0 leaves it out")
    parser.add_argument("--fake", action=argparse.BooleanOptionalAction, default=True, help="VMs of a fake host")
    asked = parser.parse_args()
    cases: list[dict[str, Any]] = []
    summary: dict[str, float] = {}
    for count, slots in ((1000, 4), (10_000, 2)) if asked.fake else ():
        cases.append(many(count, slots))
        summary[f"core_share_{count}_vms"] = cases[-1]["core_share"]
    if asked.days:
        cases.append(size(100, asked.days, 48))
        summary["mib_100_vms_90_days"] = cases[-1]["mib"] if asked.days == 90 else float("nan")
    if asked.real:
        cases.append(real(asked.real, asked.seconds))
        summary["core_share_20_real_vms_daemon"] = cases[-1]["daemon"]
        summary["core_share_20_real_vms_libvirtd"] = cases[-1]["libvirtd"]
    write("collect", {name: round(value, 5) for name, value in summary.items()}, cases)


if __name__ == "__main__":
    main()
