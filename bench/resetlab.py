"""The VMs that bench/reset.py measures, what happens in their guests, and one reset as figures."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from report import say

from hvctl.adapters.guest import agent
from hvctl.engine.applied import agent_call
from hvctl.engine.operate import Engine
from hvctl.errors import DeadlineError, HvctlError, NotFoundError, UnreachableError
from hvctl.model.operation import Outcome
from hvctl.model.reset import WHOLE, DiskPart, Hooks, Scope, Wishes
from hvctl.operations import snapshot as snapshots
from hvctl.operations import vm as vms

HVCTL = str(Path(sys.executable).with_name("hvctl"))
SNAPSHOT = "bench"
VIRSH_SNAPSHOT = "bench-virsh"
DISK = "vdb"
BOOT_SECONDS = 180.0
AGENT_SECONDS = 60.0
TRIES = 4

# Pages of the page cache, of memory that is no file's, and clusters of the root file system: just below 16 MiB in all.
WORK = "head -c 6M /dev/urandom > /var/tmp/bench; head -c 6M /dev/urandom > /dev/shm/bench; sync"
DISK_WORK = f"dd if=/dev/urandom of=/dev/{DISK} bs=64k count=32 conv=fsync 2> /dev/null"


def run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"bench: {' '.join(argv)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def milliseconds(*argv: str) -> float:
    began = time.perf_counter()
    run(*argv)
    return (time.perf_counter() - began) * 1000


@dataclass(frozen=True, slots=True)
class Figures:
    """One reset, in milliseconds: the guest's pause; the call of the verb until the guest went on; the pause and the
    guest's first sign of life after it; both passes over RAM; each step."""

    paused: float
    call: float
    life: float
    ram: float
    pages: int
    tracker: str
    steps: dict[str, float]


def figures(done: Outcome) -> Figures:
    steps: dict[str, float] = {}
    for step in done.steps:
        steps[step.name] = steps.get(step.name, 0.0) + step.seconds * 1000
    result = done.result
    paused = result["paused"] * 1000
    return Figures(
        paused,
        result["continued_after"] * 1000,
        paused + result.get("first_life", float("nan")) * 1000,
        steps.get("restore_ram", 0.0),
        result["pages"],
        result["tracker"],
        steps,
    )


class Guest:
    """A running VM of this benchmark's own."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.name = name
        self.uuid = engine.host.domains.uuid(name)
        self._engine = engine
        self._call = agent_call(engine.host, self.uuid)

    def ready(self, seconds: float = AGENT_SECONDS) -> None:
        agent.wait(self._call, seconds)

    def sh(self, script: str) -> str:
        """Run a script to its end, what it prints; again if the agent of a busy guest goes silent meanwhile."""
        for left in reversed(range(TRIES)):
            self.ready()
            try:
                done = agent.run(self._call, ["/bin/sh", "-c", script], seconds=120)
                break
            except (DeadlineError, UnreachableError):
                if not left:
                    raise
        if done.status != 0:
            raise SystemExit(f"bench: {script!r} ended with {done.status} in {self.name}: {done.stderr.decode()}")
        return done.stdout.decode()

    def start(self, script: str) -> None:
        """Leave a script running."""
        self.ready()
        self._call("guest-exec", {"path": "/bin/sh", "arg": ["-c", script]}, 5.0)

    def take(self, name: str = SNAPSHOT) -> Outcome:
        return snapshots.take(self._engine, self.name, name)

    def forget(self, name: str = SNAPSHOT) -> None:
        snapshots.delete(self._engine, self.name, name)

    def reset(self) -> Figures:
        return figures(snapshots.reset(self._engine, self.name, SNAPSHOT, WHOLE, Wishes(audit=False)))

    def reset_disk(self) -> tuple[float, float]:
        """Milliseconds that the disk was away, and those of the call until it was back."""
        scope = Scope(ram=False, devices=False, disks=(DiskPart(DISK),))
        began = time.perf_counter()
        done = snapshots.reset(self._engine, self.name, SNAPSHOT, scope, Wishes(audit=False, hooks=Hooks()))
        whole = time.perf_counter() - began
        after = 0.0
        for step in reversed(done.steps):
            if step.name == "restore_disk":
                return step.facts["away"] * 1000, (whole - after) * 1000
            after += step.seconds
        raise SystemExit("bench: the disk was not reset")

    def audit(self) -> int:
        """Pages of RAM that a reset left unlike the snapshot."""
        done = snapshots.reset(self._engine, self.name, SNAPSHOT, WHOLE, Wishes(audit=True))
        return int(done.result["missed"])


DEBIAN = ("--image", "debian", "--disk", "results:64MiB")
"""A Debian VM with a data disk that its guest does not use."""


@contextlib.contextmanager
def guest(engine: Engine, label: str, memory: str, kind: Sequence[str] = DEBIAN) -> Iterator[Guest]:
    """A VM of its own, gone afterwards whatever happens."""
    name = f"bench-{os.getpid()}-{label}"
    try:
        run(HVCTL, "vm", "create", name, *kind, "--memory", memory, "--max-memory", memory, "--start")
        made = Guest(engine, name)
        made.ready(BOOT_SECONDS)
        yield made
    finally:
        try:
            vms.delete(engine, name, force=True)
        except NotFoundError:
            pass  # It was never made.
        except HvctlError as e:
            say(f"{name} is left behind: {e.message} `hvctl vm delete {name} --force` removes it")
