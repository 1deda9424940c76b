"""`make bench-guard`: the same loads on two VMs at the same time, one of them guarded; JSON as all benchmarks.

The first load reads ever more into the guest's page cache, the second fills a scratch disk. Contention is counted from
outside, second by second: while QEMU holds more of the host's memory than the VM's part (`resident_*`), and while the
guest cannot write any more because its disk is full (`disk_*`). `work_*` is how often each load came round.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from report import say, write
from resetlab import Guest, guest

from hvctl.engine.diskuse import filled
from hvctl.engine.operate import Engine
from hvctl.engine.runtime import open_engine
from hvctl.model.guard import Allowed, GuardPolicy, Watch
from hvctl.operations import guard
from hvctl.settings import load_settings

MIB = 1 << 20
MEMORY, ROOM = "512MiB", 250 * MIB
KIND = ("--image", "micro", "--disk", "data:420MiB", "--disk", "scratch:64MiB")
EVERY = 1.0
SNAPSHOT = "clean"
FULL = 0.98
"""The share of the file system from which on nothing that the load writes fits."""

PREPARE = """
until grep -q " /data " /proc/mounts; do sleep 0.1; done
dd if=/dev/urandom of=/run/piece bs=1M count=1
dd if=/dev/zero of=/data/holes bs=1M seek=400 count=0
/sbin/mke2fs -q -t ext4 -m 0 /dev/vdb && mkdir /scratch && mount /dev/vdb /scratch && mkdir /scratch/work && sync
"""
# Holes are read as fast as the guest can, and are in its page cache all the same.
LEAK = """
while :; do
    dd if=/data/holes of=/dev/null bs=1M skip=$((i * 5 % 395)) count=5 && echo >> /run/leak.done
    i=$((i + 1)); sleep 0.5
done
"""
# The folder is on the disk, so that nothing is written while it is not mounted.
FILL = """
while :; do
    dd if=/run/piece of=/scratch/work/$i bs=1M conv=fsync && echo >> /run/fill.done
    i=$((i + 1)); sleep 0.4
done
"""
RELEASE = "i=0; until umount /scratch; do i=$((i + 1)); [ $i -lt 100 ] || exit 1; sleep 0.1; done"
SCRATCH = Allowed("disk:scratch", 0.0, before=(("/bin/sh", "-c", RELEASE),), after=(("mount", "/dev/vdb", "/scratch"),))


def policy(resident: int) -> Watch:
    rules = GuardPolicy(
        "the page cache goes back, a scratch disk that fills is emptied", (Allowed("cache"), SCRATCH), SNAPSHOT,
        threshold=1.0, looks=1, horizon=20.0, window=20.0, cool_down=3.0, resident=resident,
    )  # fmt: skip
    return Watch("bench", rules)


@dataclass
class Counted:
    """Of one VM under one load: seconds of contention, and the highest that was seen of what runs out."""

    seconds: float = 0.0
    highest: float = 0.0
    work: int = 0


@dataclass
class Load:
    name: str
    script: str
    level: Callable[[Engine, Guest], float]
    limits: dict[str, float]
    counted: dict[str, Counted] = field(default_factory=dict)


def resident(engine: Engine, vm: Guest) -> float:
    return next(float(r.rss or 0) for r in engine.host.meter.read().vms if r.uuid == vm.uuid)


def share(engine: Engine, vm: Guest) -> float:
    """What the guest cannot say, while its disk is away, is not full."""
    return filled(engine.host, engine.host.domains.get(vm.uuid)).get("vdb", 0.0)


def under(engine: Engine, pair: tuple[Guest, Guest], load: Load, seconds: float) -> None:
    """Run a load on both, and look at both once a second; the guard looks as often."""
    load.counted = {vm.name: Counted() for vm in pair}
    for vm in pair:
        vm.sh(f"cat > /run/{load.name} << 'END'\ni=0\n{load.script}\nEND\n"
              f"sh /run/{load.name} > /dev/null 2>&1 & echo $! > /run/{load.name}.pid")  # fmt: skip
    began = last = time.monotonic()
    while last - began < seconds:
        done = guard.cycle(engine)
        now = time.monotonic()
        for vm in pair:
            one, level = load.counted[vm.name], load.level(engine, vm)
            one.highest = max(one.highest, level)
            one.seconds += now - last if level >= load.limits[vm.name] else 0.0
        last = now
        if "nothing" not in done:
            say(f"{load.name}: {last - began:.0f} s: {done}")
        time.sleep(max(0.0, EVERY - (time.monotonic() - now)))
    for vm in pair:
        vm.sh(f"kill $(cat /run/{load.name}.pid)")
        load.counted[vm.name].work = int(vm.sh(f"wc -l < /run/{load.name}.done"))


def measure(engine: Engine, seconds: float) -> tuple[dict[str, float | str], list[dict[str, object]]]:
    with ExitStack() as stack:
        say("starting two VMs of 512 MiB")
        pair = tuple(stack.enter_context(guest(engine, label, MEMORY, KIND)) for label in ("with", "without"))
        for vm in pair:
            vm.sh(PREPARE)
        guarded, alone = pair
        guarded.take(SNAPSHOT)
        limits = {vm.name: resident(engine, vm) + ROOM for vm in pair}
        guard.arm(engine, guarded.uuid, policy(int(limits[guarded.name])))
        loads = [
            Load("leak", LEAK, resident, limits),
            Load("fill", FILL, share, dict.fromkeys(limits, FULL)),
        ]
        for load in loads:
            under(engine, (guarded, alone), load, seconds)
        rows = engine.store.guards.of_vm(engine.facts.name, guarded.uuid)
        guard.arm(engine, guarded.uuid, None)
    names = {"with": guarded.name, "without": alone.name}
    summary: dict[str, float | str] = {
        f"contention_seconds_{how}": sum(load.counted[name].seconds for load in loads) for how, name in names.items()
    }
    for load, what in zip(loads, ("resident", "disk"), strict=True):
        for how, name in names.items():
            summary[f"{what}_seconds_{how}"] = load.counted[name].seconds
            summary[f"work_{load.name}_{how}"] = load.counted[name].work
    acted = [d.decision.chosen.part for d in rows if d.decision.chosen and d.outcome == "done"]
    summary |= {f"resets_{part.partition(':')[0]}": acted.count(part) for part in ("cache", "disk:scratch")}
    summary |= {"seconds_each": seconds, "looks": sum(d.looks for d in rows), "rows": len(rows)}
    cases: list[dict[str, object]] = [
        {"case": f"{load.name}_{how}", "seconds": load.counted[name].seconds, "highest": load.counted[name].highest,
         "limit": load.limits[name], "work": load.counted[name].work}
        for load in loads for how, name in names.items()
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
