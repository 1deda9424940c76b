"""What holds while a snapshot or a reset has a real guest stand still, or a disk of it change places, and no longer:
processors stay awake, and hvctl's thread and QEMU go before all others of the host. The kernel tells, when QEMU is
asked for it; and with the stop of a whole reset QEMU is told of its load."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from host.marked import Marked
from hvctl.adapters.qemu.qmp import Qmp
from hvctl.adapters.snapshots.machine import QemuMachine
from hvctl.decide.scope import parse_scope
from hvctl.engine.operate import Engine
from hvctl.operations import snapshot

pytestmark = pytest.mark.host

FIRST = os.SCHED_RR | os.SCHED_RESET_ON_FORK
PROCESSORS = Path("/dev/cpu_dma_latency")
# A kernel with RT_GROUP_SCHED lets nobody go first in a group without a share of real time, as libvirt's are.
ROOT_GROUP = Path("/sys/fs/cgroup/cpu/cgroup.procs")
# The guest stands still from one of these to the next, and has another disk with the third.
ASKED = {"stop", "cont", "qom-set"}


def held(qemu: int) -> str:
    """Of whom it holds now; hvctl is the thread that asks."""
    found = {name for name, tid in {"hvctl": 0, "QEMU": qemu}.items() if os.sched_getscheduler(tid) == FIRST}
    found |= {"processors" for fd in Path("/proc/self/fd").iterdir() if fd.resolve() == PROCESSORS}
    return " ".join(sorted(found))


@pytest.fixture(scope="module")
def offered(pair: Marked) -> str:
    """What of it this host lets hvctl have."""
    qemu = pair.guest.pid
    if ROOT_GROUP.exists():
        ROOT_GROUP.write_text(str(qemu))
    with asked_for(qemu):
        return held(qemu)


@contextmanager
def asked_for(qemu: int) -> Iterator[None]:
    opened = None
    with suppress(OSError):
        opened = os.open(PROCESSORS, os.O_WRONLY)
    for tid in (0, qemu):
        with suppress(PermissionError):
            os.sched_setscheduler(tid, FIRST, os.sched_param(1))
    try:
        yield
    finally:
        for tid in (0, qemu):
            os.sched_setscheduler(tid, os.SCHED_OTHER, os.sched_param(0))
        if opened is not None:
            os.close(opened)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, pair: Marked) -> dict[str, list[str]]:
    """What was held `amid` it, when QEMU was about to be asked, and what `after` it; the jobs that it was `told` of."""
    found: dict[str, list[str]] = defaultdict(list)
    qemu = pair.guest.pid

    def look(commands: Sequence[str]) -> None:
        if not ASKED.isdisjoint(commands):
            found["amid"].append(held(qemu))

    def execute(self: Qmp, command: Any, *arguments: Any, ask: Any = Qmp.execute) -> Any:
        look([command])
        return ask(self, command, *arguments)

    def execute_all(self: Qmp, commands: Any, ahead: Any = None, ask: Any = Qmp.execute_all) -> Any:
        look([command for command, _ in commands])
        if ahead is not None:
            found["told"].append(ahead.job)
        return ask(self, commands, ahead)

    # Elsewhere there are other pauses, which hurry nobody: a copy of a disk that is in use takes some.
    for name in ("pause", "resume", "restore_disk"):

        def asks(*arguments: Any, of: str = name, ask: Any = getattr(QemuMachine, name), **named: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(Qmp, "execute", execute)
                patch.setattr(Qmp, "execute_all", execute_all)
                answer = ask(*arguments, **named)
            if of != "pause":
                found["after"].append(held(qemu))
            return answer

        monkeypatch.setattr(QemuMachine, name, asks)
    return found


@pytest.fixture(scope="module")
def old(engine: Engine, pair: Marked) -> Iterator[str]:
    snapshot.take(engine, pair.guest.name, "old")
    yield "old"
    snapshot.delete(engine, pair.guest.name, "old")


def take(engine: Engine, pair: Marked) -> None:
    snapshot.take(engine, pair.guest.name, "more")
    snapshot.delete(engine, pair.guest.name, "more")


def reset_disk(engine: Engine, pair: Marked) -> None:
    pair.guest.await_answer()  # it says that it does not use the disk
    snapshot.reset(engine, pair.guest.name, "old", parse_scope(["disk:results"]))


def reset(engine: Engine, pair: Marked) -> None:
    snapshot.reset(engine, pair.guest.name, "old")


@pytest.mark.parametrize(("verb", "told"), [(take, []), (reset_disk, []), (reset, ["snapshot-load"])])
def test_who_goes_first_while_a_guest_stands_still(
    engine: Engine,
    pair: Marked,
    old: str,
    offered: str,
    seen: dict[str, list[str]],
    verb: Callable[[Engine, Marked], None],
    told: list[str],
) -> None:
    verb(engine, pair)
    assert seen["told"] == told
    if not offered:
        pytest.skip("this host lets nobody go first, and its processors sleep when they like")
    assert set(seen["amid"]) == {offered}
    assert set(seen["after"]) == {""}
