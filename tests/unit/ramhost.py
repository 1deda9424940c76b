"""QemuMachine on RAM that this process maps, with a tracker that is a set: what a guest wrote, and what a kernel would
know of it. It can die at any of its effects."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hvctl.adapters.disks import diskpart
from hvctl.adapters.kernel.process import start_time
from hvctl.adapters.qemu import devicetree
from hvctl.adapters.ram import layers, ramcompare, ramfile, tracking
from hvctl.adapters.ram.pages import PAGE
from hvctl.adapters.snapshots import snapshotfolder
from hvctl.adapters.snapshots.machine import QemuMachine
from hvctl.adapters.snapshots.opened import Opened
from hvctl.adapters.snapshots.ramback import RamBack
from hvctl.adapters.snapshots.ramcopy import RamCopy
from hvctl.errors import RefusedError, UnreachableError
from hvctl.model.allocation import Allocation
from hvctl.model.host import HostFacts
from hvctl.model.snapshot import Binding, Range, Snapshot
from hvctl.model.vm import Accel, Process, State, Vm
from hvctl.settings import Settings
from unit.ramlab import Lab, page_of

UUID = "6e0a1f0e-5c1b-4b7e-9b52-0d3b3b1f8a01"
MIB = 1 << 20


class DiedError(BaseException):
    """As kill -9: nobody catches it, and nothing of hvctl runs after it."""


class Kernel:
    """The guest's RAM, and which pages it wrote since somebody asked; those given to the balloon are not among them."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.pages = sum(lab.sizes)
        self.written = set(range(self.pages))
        self.inflations: int | None = 0
        self.running = True
        self.dead = False
        self.lost: str | None = None
        self.works = {"uffd"}
        self.opened = 0
        self.fuse: int | None = None
        self.died = False

    def burn(self) -> None:
        """Before and after each effect."""
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                self.died = True
                raise DiedError

    def write(self, first: int, count: int, content: int) -> None:
        for page in range(first, min(first + count, self.pages)):
            self.lab.put(page, page_of(page, content))
            self.written.add(page)

    def discard(self, first: int, count: int) -> None:
        for page in range(first, min(first + count, self.pages)):
            self.lab.punch(page)
        if self.inflations is not None:
            self.inflations += 1


class SetTracker:
    """trackers.Tracker on a Kernel."""

    def __init__(self, kernel: Kernel, kind: str) -> None:
        self.kernel, self.kind = kernel, kind
        self.closed = False
        kernel.opened += 1

    def arm(self, where: NDArray[np.int64] | None = None, /) -> None:
        self.collect(where)

    def collect(self, where: NDArray[np.int64] | None = None, /) -> NDArray[np.int64]:
        found = self.peek(where)
        self.kernel.burn()
        self.kernel.written -= {p for first, last in found.tolist() for p in range(first // PAGE, last // PAGE)}
        self.kernel.burn()
        return found

    def peek(self, where: NDArray[np.int64] | None = None, /) -> NDArray[np.int64]:
        assert not self.closed
        if self.kernel.lost:
            raise RefusedError(self.kernel.lost)
        spans = [(0, self.kernel.pages * PAGE)] if where is None else where.tolist()
        inside = sorted(p for p in self.kernel.written if any(a <= p * PAGE < b for a, b in spans))
        return np.array([(p * PAGE, p * PAGE + PAGE) for p in inside], np.int64).reshape(-1, 2)

    def token(self) -> str:
        return f"token of {self.kind}"

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        self.kernel.opened -= 1


class StillInside:
    """adapters.qemu.inside.Inside as far as RAM is concerned."""

    def __init__(self, kernel: Kernel, process: Process) -> None:
        self.kernel, self.process = kernel, process
        self.graph = SimpleNamespace(own=set(), bypasses_cache=False, tagged=lambda tag: (), writable=dict)
        self.binding = Binding(process, ("cpu0",), ())
        self.qmp = SimpleNamespace(execute=lambda *_: None)

    def alive(self) -> None:
        if self.kernel.dead:
            raise UnreachableError("the QEMU process is gone.")

    def forget(self) -> None: ...

    def look(self) -> None: ...

    def inflations(self) -> int | None:
        return self.kernel.inflations

    def refuse_unless_paused(self) -> None:
        if self.kernel.running:
            raise RefusedError("the guest is running, not paused.")


class StillOpened(Opened):
    """With the one process that there is."""

    def __init__(self, settings: Settings, held: Any) -> None:
        super().__init__(settings)
        self._held = held

    def inside(self, vm: Vm) -> Any:
        return self._held


class RamHost:
    """One VM with RAM, and hvctl commands one after the other: each begins with `command()`."""

    def __init__(self, root: Path, lab: Lab, budget: int | None = None) -> None:
        self.kernel = Kernel(lab)
        self.settings = Settings(
            state_dir=str(root / "state"), run_dir=str(root / "run"), ram_dir=str(root / "ram"), memory_margin=0,
            snapshot_budget=budget,
        )  # fmt: skip
        self.process = Process(os.getpid(), start_time(os.getpid()) or 0, "boot")
        self.vm = Vm(
            UUID, "a", State.RUNNING, "booted", Accel.TCG, True, self.process, Allocation(1, MIB), 1, MIB, (), (),
            None, ram=lab.regions,
        )  # fmt: skip
        self.count = 0
        self.machine = self._new()

    def _new(self) -> QemuMachine:
        facts = HostFacts("h", "qemu:///system", 1, 1, "", "", "", 2, os.geteuid(), os.getegid())
        made = QemuMachine(self.settings, facts, lambda _: "")
        made._opened = StillOpened(self.settings, StillInside(self.kernel, self.process))
        made._copy = RamCopy(self.settings, made._opened)
        made._back = RamBack(self.settings, made._opened)
        return made

    def command(self) -> QemuMachine:
        """Another hvctl; what the last one had open is let go by the kernel, however it ended."""
        self.kernel.fuse = None
        if self.kernel.died:
            self.kernel.died = False
            while self.machine._opened._trackings:  # it told nothing any more
                self.machine._opened._trackings.popitem()[1].let_go()
        self.machine.close()
        self.machine = self._new()
        return self.machine

    def folder(self, id: str) -> Path:
        return self.settings.snapshots_dir / UUID / id

    def describe(self, parent: str | None = None, **parts: Any) -> Snapshot:
        self.count += 1
        id = f"{self.count:08d}-0000"
        whole = Snapshot(
            id, f"s{self.count}", UUID, f"2026-01-01T00:00:{self.count:04}Z", Binding(self.process, ("cpu0",), ()),
            f"hvctl-{id}", {}, f"hvctl-{id[:8]}", str(self.folder(id)), self.vm.ram, MIB, 1, 0, parent,
        )  # fmt: skip
        return replace(whole, **parts)

    def range_of(self, first: int, last: int) -> Range:
        """Guest-physical, which is the place in the row here; of one region."""
        return Range(first * PAGE, last * PAGE)

    def address_of(self, asked: Range) -> tuple[int, int]:
        for span in self.machine._opened.ram(self.vm).spans():
            if span.offset <= asked.start < span.offset + span.length:
                return span.address + asked.start - span.offset, span.address + asked.end - span.offset
        raise RefusedError("the guest has no RAM there.")

    def prepare(self, snapshot: Snapshot) -> None:
        folder = Path(snapshot.folder)
        snapshotfolder.make(self.settings.snapshots_dir, folder)
        (folder / snapshotfolder.VMSTATE).touch()


@contextmanager
def connected(host: RamHost) -> Iterator[None]:
    """The product's trackers are sets, and each of its effects may be its last."""
    kernel = host.kernel
    with pytest.MonkeyPatch.context() as patch:

        def opened(kind: str, *_: object) -> SetTracker:
            if kind not in kernel.works:
                raise RefusedError(f"this kernel has no {kind}.")
            return SetTracker(kernel, kind)

        patch.setattr(tracking, "open_tracker", opened)
        patch.setattr(tracking, "resume_tracker", lambda kind, *_: opened(kind))
        patch.setattr(tracking, "end_tracker", lambda *_: kernel.burn())
        patch.setattr(tracking, "self_probe", lambda *_: kernel.burn())
        patch.setattr(devicetree, "host_range", lambda _, asked: host.address_of(asked))
        patch.setattr(diskpart, "forget", lambda *_: None)
        for owner, name in EFFECTS:
            patch.setattr(owner, name, _fused(kernel, getattr(owner, name)))
        yield


EFFECTS: Sequence[tuple[Any, str]] = (
    (tracking, "_write_state"),
    (ramcompare, "write"),
    (ramcompare, "writing"),
    (ramcompare, "restore"),
    (layers.Writer, "store"),
    (layers.Writer, "put"),
    (layers.Writer, "finish"),
    (layers, "wipe_unseen"),
    (snapshotfolder, "publish"),
    (snapshotfolder, "unpublish"),
    (snapshotfolder, "remove"),
    (ramfile, "wipe"),
)


def _fused(kernel: Kernel, call: Any) -> Any:
    def burning(*args: Any, **kwargs: Any) -> Any:
        kernel.burn()
        result = call(*args, **kwargs)
        kernel.burn()
        return result

    return burning
