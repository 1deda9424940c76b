"""`make bench-allocate`: how long a running VM takes to shrink and grow as its guest sees it, beside the same changes
by virsh and tc, and what hvctl itself adds: the operation engine per operation, and --help beside an empty Python."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from report import say, spread, write

from hvctl.adapters.fake import FakeWorld
from hvctl.engine import execute
from hvctl.engine.runtime import open_engine
from hvctl.model.allocation import Allocation, Change, Record
from hvctl.operations.allocate import allocate
from hvctl.settings import Settings

HVCTL = str(Path(sys.executable).with_name("hvctl"))
MIB = 1 << 20


def run(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def facts(vm: str) -> Any:
    return json.loads(run(HVCTL, "-f", "json", "vm", "show", vm))["vm"]


@contextlib.contextmanager
def guest() -> Iterator[str]:
    """A running micro VM of 2 GiB at most, on a bridge of its own, gone afterwards."""
    name, bridge = f"bench-{os.getpid()}", f"hvbench{os.getpid() % 100000}"
    run("ip", "link", "add", bridge, "type", "bridge")
    try:
        run(HVCTL, "vm", "create", name, "--image", "micro", "--memory", "1536MiB", "--max-memory", "1536MiB",
            "--nic", bridge, "--start")  # fmt: skip
        while subprocess.run([HVCTL, "vm", "exec", name, "--", "true"], capture_output=True, check=False).returncode:
            time.sleep(0.2)
        yield name
    finally:
        subprocess.run([HVCTL, "vm", "delete", name, "--force"], capture_output=True, check=False)
        run("ip", "link", "delete", bridge)


def guest_total(vm: str) -> int:
    """MemTotal as the guest's kernel has it, in bytes."""
    return int(run(HVCTL, "vm", "exec", vm, "--", "awk", "/MemTotal/{print $2}", "/proc/meminfo")) * 1024


def memory(vm: str, rounds: int) -> list[dict[str, Any]]:
    """Each figure ends when the driver has reached the target; the guest's own MemTotal is read after it."""
    cases = []
    for label, low in (("256mib", 1280), ("1gib", 512)):
        shrink, grow, seen = [], [], []
        for _ in range(rounds):
            shrink.append(seconds(lambda low=low: run(HVCTL, "allocate", vm, "--memory", f"{low}MiB")))  # type: ignore[misc]
            small = guest_total(vm)
            grow.append(seconds(lambda: run(HVCTL, "allocate", vm, "--memory", "1536MiB")))
            seen.append(guest_total(vm) - small)
        say(f"{label}: shrink {statistics.median(shrink):.2f} s, grow {statistics.median(grow):.2f} s")
        cases.append({"case": f"shrink_{label}", "guest_difference": seen, **spread(shrink)})
        cases.append({"case": f"grow_{label}", "guest_difference": seen, **spread(grow)})
    return cases


def by_hand(vm: str, rounds: int) -> list[dict[str, Any]]:
    """The whole change as one hvctl command, and as an operator types it with virsh and tc; in turn, A B A B."""
    tap = facts(vm)["nics"][0]["tap"]
    sets = [("1", "1280MiB", "500", "20Mbit"), ("2", "1536MiB", "900", "40Mbit")]
    ours: list[float] = []
    theirs: list[float] = []

    def hvctl_way(vcpus: str, size: str, iops: str, rate: str) -> None:
        run(HVCTL, "allocate", vm, "--vcpus", vcpus, "--memory", size, "--iops", iops, "--net-in", rate)

    def hand_way(vcpus: str, size: str, iops: str, rate: str) -> None:
        want = int(size.removesuffix("MiB")) * 1024
        # An emulated QEMU cannot unplug, so by hand too a vCPU only goes offline, and is still plugged when it returns.
        run("virsh", "setvcpus", vm, vcpus, "--guest")
        run("virsh", "setmem", vm, f"{want}k", "--live")
        while f"actual {want}\n" not in run("virsh", "dommemstat", vm):
            time.sleep(0.05)
        run("virsh", "blkdeviotune", vm, "vda", "--total-iops-sec", iops, "--live")
        run("tc", "qdisc", "replace", "dev", tap, "root", "tbf", "rate", rate, "burst", "64kb", "latency", "50ms")

    for _ in range(rounds):
        ours += [seconds(lambda s=s: hvctl_way(*s)) for s in sets]  # type: ignore[misc]
        run(HVCTL, "allocate", vm, "--net-in", "none")
        theirs += [seconds(lambda s=s: hand_way(*s)) for s in sets]  # type: ignore[misc]
        run("tc", "qdisc", "delete", "dev", tap, "root")
    say(f"whole change: hvctl {statistics.median(ours):.2f} s, by hand {statistics.median(theirs):.2f} s")
    return [{"case": "whole_hvctl", **spread(ours)}, {"case": "whole_by_hand", **spread(theirs)}]


def engine_overhead(rounds: int) -> dict[str, Any]:
    """One allocate on a fake host with durable rows, minus the time of its steps and of observing the host."""
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent.parent / "build") as folder:
        world = FakeWorld(Path(folder) / "world.json")
        world.add_vm("a", record=Record(Allocation(1, 256 * MIB)), max_memory=1024 * MIB)
        settings = Settings(uri=world.uri, state_dir=folder, run_dir=f"{folder}/run", ram_dir=f"{folder}/ram")
        figures = []
        with open_engine(settings) as engine:
            effects = 0.0
            real = execute.apply

            def timed(*arguments: Any) -> Any:
                nonlocal effects
                began = time.perf_counter()
                try:
                    return real(*arguments)
                finally:
                    effects += time.perf_counter() - began

            execute.apply = timed
            try:
                for i in range(rounds):
                    effects = 0.0
                    whole = seconds(lambda i=i: allocate(engine, "a", Change(cpu_quota=100 + i % 2)))  # type: ignore[misc]
                    figures.append((whole - effects) * 1000)
            finally:
                execute.apply = real
        return {"case": "engine_overhead_ms", **spread(figures)}


def startup(rounds: int) -> list[dict[str, Any]]:
    ours, empty = [], []
    for _ in range(rounds):
        ours.append(seconds(lambda: run(HVCTL, "--help")) * 1000)
        empty.append(seconds(lambda: run(sys.executable, "-c", "pass")) * 1000)
    return [{"case": "help_ms", **spread(ours)}, {"case": "python_ms", **spread(empty)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    (Path(__file__).parent.parent / "build").mkdir(exist_ok=True)
    cases = startup(rounds * 2)
    cases.append(engine_overhead(rounds * 20))
    with guest() as vm:
        cases += memory(vm, rounds)
        cases += by_hand(vm, rounds)
    median = {case["case"]: case["median"] for case in cases}
    write(
        "allocate",
        {
            "grow_1gib_seconds": median["grow_1gib"],
            "shrink_1gib_seconds": median["shrink_1gib"],
            "grow_256mib_seconds": median["grow_256mib"],
            "shrink_256mib_seconds": median["shrink_256mib"],
            "whole_hvctl_seconds": median["whole_hvctl"],
            "whole_by_hand_seconds": median["whole_by_hand"],
            "engine_overhead_ms": median["engine_overhead_ms"],
            "help_ms": median["help_ms"],
            "python_ms": median["python_ms"],
        },
        cases,
    )


if __name__ == "__main__":
    main()
