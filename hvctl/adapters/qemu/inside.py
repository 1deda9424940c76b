"""One QEMU process, held for the length of an operation: its pid, its monitor, and what it is made of.

The monitor has room for one client, so a process is let go when its operation ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from hvctl.adapters.kernel.processhold import held
from hvctl.adapters.kernel.urgency import calm
from hvctl.adapters.qemu import blockgraph, devicetree
from hvctl.adapters.qemu.blockgraph import Graph
from hvctl.adapters.qemu.qmp import Ahead, Command, Qmp
from hvctl.errors import GuestError, HvctlError, RefusedError
from hvctl.model.snapshot import Binding
from hvctl.model.vm import Process, Vm

# What QEMU calls a guest that does not run and is whole: paused, or left so by a save or load that was interrupted, or
# one that was never started.
_STOPPED: Final = frozenset({"paused", "save-vm", "restore-vm", "postmigrate", "prelaunch"})
_MIGRATING: Final = frozenset(
    {"setup", "active", "postcopy-active", "postcopy-paused", "pre-switchover", "device", "wait-unplug", "cancelling"}
)
# What may change before the pause, beside the guest's own doing.
_LOOKS: Final[tuple[Command, ...]] = (
    ("query-migrate", {}),
    ("query-jobs", {}),
    ("query-block", {}),
    devicetree.QUESTIONS[0],
)
_LEFT_OUT: Final = "x-ignore-shared"
_INFLATE_QUEUE: Final = 0  # of virtio-balloon, by the virtio standard


class Inside:
    """Opened with `inside()`. What it is made of is asked once, and what can be plugged again under the pause."""

    def __init__(self, vm: Vm, process: Process, qmp: Qmp, alive: Callable[[], None], own_folder: Path) -> None:
        self.name = vm.name
        self.process = process
        self.qmp = qmp
        self.alive = alive
        self._own_folder = own_folder
        self._looked = False  # right before the pause
        self._still = False  # seen to be paused, with what must not change seen at that time
        self._counted: int | None = None
        self._untold = False

    @cached_property
    def _answers(self) -> list[Any]:
        return self.qmp.execute_all(
            [
                ("query-jobs", {}),
                ("query-block", {}),
                *devicetree.QUESTIONS,
                ("query-named-block-nodes", {"flat": True}),
            ]
        )

    def forget(self) -> None:
        """Something in the process was changed: it must be asked again."""
        for known in ("_answers", "graph", "binding"):
            self.__dict__.pop(known, None)

    @cached_property
    def graph(self) -> Graph:
        jobs, block, *_, named = self._answers
        return blockgraph.graph(named, block, jobs, self._own_folder)

    @cached_property
    def binding(self) -> Binding:
        return Binding(self.process, devicetree.words(self._answers[2:-1]), self.graph.fingerprint())

    def look(self) -> None:
        """Right before the guest is paused, all that can be asked while it runs: nobody migrates it, nothing was
        plugged or unplugged since `binding` was told, and nothing is about to be; RefusedError."""
        *looks, pending = self.qmp.execute_all([*_LOOKS, devicetree.PENDING])
        self._refuse_changed(looks)
        if not devicetree.refuse_pending(pending):
            devicetree.refuse_pending(*self.qmp.execute_all([devicetree.PENDING_ELSE]))
        self._looked = True
        _ = self.counter

    def stop(self, ahead: Ahead | None = None) -> None:
        """Pause the guest; ahead: what comes next, as in Qmp.execute_all. With a look right before it, that it is
        paused is all that is left to see: what QEMU does by itself or for the guest it reports unasked, and what
        somebody else does through another monitor within this millisecond would be missed by asking once more, too."""
        self._still = False
        _, *counts = self.qmp.execute_all([("stop", {}), *self.counter], ahead)
        self.counted(counts)
        heard = self.qmp.heard()
        if "STOP" not in heard:
            self._refuse_running(self.qmp.execute("query-status"))  # It stood still before, and may be broken.
        self._still = self._looked and "DEVICE_DELETED" not in heard

    def go_on(self) -> float:
        """When it went on; see Qmp.go_on."""
        self._still = self._looked = False
        return self.qmp.go_on()

    def is_paused(self) -> bool:
        return (self._still and self.qmp.heard() <= {"STOP"}) or not self.qmp.execute("query-status")["running"]

    def refuse_unless_paused(self) -> None:
        """The guest is paused, nobody migrates it, and nothing was plugged or unplugged since `binding` was told.

        Asked once in a pause. After it, what tells is that QEMU reported no RESUME: that also sees a guest which
        somebody let go on and paused again, and asking a second time would not."""
        if self._still:
            heard = self.qmp.heard()
            if heard <= {"STOP"}:
                return
            self._still = False
            if "RESUME" in heard:
                raise RefusedError(f"somebody else let {self.name} go on just now.", f"hvctl vm show {self.name}")
        status, *looks = self.qmp.execute_all([("query-status", {}), *_LOOKS])
        self._refuse_running(status)
        self._refuse_changed(looks)
        self.qmp.heard()
        self._still = True

    def _refuse_running(self, status: Any) -> None:
        if status["running"] or status["status"] not in _STOPPED:
            raise RefusedError(f"{self.name} is {status['status']}, not paused.", f"virsh suspend {self.name}")

    def _refuse_changed(self, looks: Sequence[Any]) -> None:
        migration, *now = looks
        if migration.get("status") in _MIGRATING:
            raise RefusedError(f"{self.name} is being migrated or saved.", "wait for it: virsh domjobinfo")
        if _shape(now) != _shape(self._answers):
            raise RefusedError(f"the devices or disks of {self.name} changed just now.", "try it again")

    def inflations(self) -> int | None:
        """A number that changes when the guest gave pages to its balloon, 0 for a guest without one, None if this QEMU
        does not tell: what is given away and then only read again looks clean to a tracker of writes."""
        if not self._still or self._counted is None:
            self.counted(self.qmp.execute_all(self.counter) if self.counter else ())
        return self._counted

    @cached_property
    def counter(self) -> tuple[Command, ...]:
        """The question for the number of inflations, to be asked along with others; none without a balloon, or if this
        QEMU does not tell."""
        try:
            devices = self.qmp.execute("x-query-virtio")
            path = next((str(d["path"]) for d in devices if d["name"] == "virtio-balloon"), None)
            question: Command = ("x-query-virtio-queue-status", {"path": path, "queue": _INFLATE_QUEUE})
            if path is None or "last-avail-idx" in self.qmp.execute(*question):
                return () if path is None else (question,)
        except GuestError:
            pass
        self._untold = True
        return ()

    def counted(self, answers: Sequence[Any]) -> None:
        """The answers to `counter`."""
        self._counted = int(answers[0]["last-avail-idx"]) if answers else None if self._untold else 0


def leave_out_ram(on: bool) -> Command:
    """Have saves and loads leave guest RAM out that is in a shared file. libvirt does not know of it: with it on, its
    own saves and migrations would silently be without RAM."""
    return "migrate-set-capabilities", {"capabilities": [{"capability": _LEFT_OUT, "state": on}]}


def _shape(answers: Sequence[Any]) -> tuple[Any, ...]:
    """What of query-jobs, query-block and the devices must not change between the first look and the pause."""
    jobs, block, devices = answers[:3]
    return blockgraph.others(jobs), blockgraph.disks(block), devicetree.children(devices)


@contextmanager
def inside(vm: Vm, deadline: float, own_folder: Path) -> Iterator[Inside]:
    """The very process that `vm` was observed with. UnreachableError: it is gone, or its monitor is not to be had."""
    if vm.process is None or not vm.ram:
        raise RefusedError(f"{vm.name} has no QEMU process with RAM in a shared file.", f"hvctl vm show {vm.name}")
    if vm.monitor is None:
        raise RefusedError(f"{vm.name} has no monitor for hvctl.", f"hvctl vm adopt {vm.name}")
    with ExitStack() as stack:
        alive = stack.enter_context(held(vm.process, vm.name))
        qmp = stack.enter_context(Qmp(vm.monitor, deadline, vm.process.pid))
        # What a killed hvctl may have left: a concluded job keeps its id, the switch of a load is on, an urgent process
        # has its policy.
        qmp.dismiss_jobs()
        if {"capability": _LEFT_OUT, "state": True} in qmp.execute("query-migrate-capabilities"):
            qmp.execute(*leave_out_ram(False))
        calm(vm.process.pid)
        yield Inside(vm, vm.process, qmp, alive, own_folder)
        with suppress(HvctlError):
            qmp.dismiss()
