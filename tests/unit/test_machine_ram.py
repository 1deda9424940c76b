"""Guest RAM through any row of commands: taking, resetting to any snapshot, in parts, deleting, dying anywhere.

Whatever happened before, a reset that is told as done has made RAM what it was, byte for byte, and comparing all of it
finds nothing. The guest's side is in ramhost.py.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hvctl.adapters.ram.pages import CHUNK, PAGE
from hvctl.adapters.snapshots.machine import QemuMachine
from hvctl.decide.reset import parent_of
from hvctl.errors import UnreachableError
from hvctl.model.snapshot import Snapshot
from hvctl.model.tracker import TrackerKind
from unit.ramhost import DiedError, RamHost, connected
from unit.ramlab import Lab, folder, lab, unlike

# More than two page tables, and a border of regions within one.
SIZES = (CHUNK + 100, CHUNK - 7)
PAGES = sum(SIZES)
pages = st.integers(0, PAGES - 1)
counts = st.sampled_from((1, 2, 30, 300))
works = st.lists(st.tuples(pages, counts, st.integers(0, 3)), max_size=4)
discards = st.lists(st.tuples(pages, counts), max_size=1)
fuses = st.none() | st.none() | st.integers(0, 40)
which = st.integers(0, 7)


@pytest.mark.parametrize("call", ["copy_ram", "restore_ram", "audit"])
def test_what_is_done_with_the_ram_of_a_process_that_ended_is_not_done(call: str) -> None:
    """The file of its RAM is there, and can be read and written, as long as anybody has it open."""
    with ExitStack() as stack:
        host = RamHost(stack.enter_context(folder()), stack.enter_context(lab(SIZES)))
        stack.enter_context(connected(host))
        stack.callback(host.machine.close)
        host.kernel.running = False
        snapshot, other = host.describe(), host.describe()
        for one in (snapshot, other):
            host.prepare(one)
        machine = host.machine
        machine.arm(host.vm, TrackerKind.AUTO)
        machine.copy_ram(host.vm, snapshot)
        machine.publish(snapshot)
        host.kernel.dead = True
        with pytest.raises(UnreachableError):
            getattr(machine, call)(host.vm, other if call == "copy_ram" else snapshot)
        known = machine.tracking(host.vm)
        assert call == "audit" or known is None or known.base is None


@pytest.mark.parametrize("foreseen", [0, 1])
def test_what_a_guest_writes_after_a_reset_was_foreseen_goes_back_too(foreseen: int) -> None:
    """Whichever snapshot it was foreseen for: of two, it is the first that the guest goes back to."""
    with ExitStack() as stack:
        ram = stack.enter_context(lab(SIZES))
        host = RamHost(stack.enter_context(folder()), ram)
        stack.enter_context(connected(host))
        stack.callback(host.machine.close)
        kept = []
        for content in (1, 2):
            snapshot = host.describe(kept[-1][0].id if kept else None)
            host.prepare(snapshot)
            host.kernel.running = False
            if not kept:
                host.machine.arm(host.vm, TrackerKind.AUTO)
            host.kernel.write(10, 3, content)
            host.machine.copy_ram(host.vm, snapshot)
            host.machine.publish(snapshot)
            kept.append((snapshot, ram.everything()))
        host.kernel.running = True
        host.kernel.write(11, 2, 3)
        machine = host.command()
        machine.ready(host.vm, kept[foreseen][0])
        host.kernel.write(21, 30, 3)
        host.kernel.running = False
        assert machine.restore_ram(host.vm, kept[0][0]).pages == 3 + 30
        assert unlike(ram.everything(), kept[0][1]) == []


class Commands(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.lab: Lab = self.stack.enter_context(lab(SIZES))
        self.host = RamHost(self.stack.enter_context(folder()), self.lab)
        self.stack.enter_context(connected(self.host))
        self.taken: dict[str, tuple[Snapshot, bytes]] = {}

    def teardown(self) -> None:
        self.host.kernel.fuse = None
        self.host.machine.close()
        assert self.host.kernel.opened == 0
        self.stack.close()

    # --- the guest

    @initialize(work=works)
    def boots(self, work: list[tuple[int, int, int]]) -> None:
        self._work(work)

    @rule(work=works, given=discards)
    def the_guest_works(self, work: list[tuple[int, int, int]], given: list[tuple[int, int]]) -> None:
        self._work(work)
        self._give(given)

    def _work(self, work: list[tuple[int, int, int]]) -> None:
        for first, count, content in work:
            self.host.kernel.write(first, count, content)

    def _give(self, given: list[tuple[int, int]]) -> None:
        for first, count in given:
            self.host.kernel.discard(first, count)

    # --- commands

    @rule(fuse=fuses, live=st.booleans(), work=works, given=discards)
    def takes(self, fuse: int | None, live: bool, work: Any, given: Any) -> None:
        """The guest writes, and gives pages to its balloon, between the copy that runs beside it and the pause."""
        machine = self.host.command()
        snapshot = self._describe(machine)
        content: list[bytes] = []

        def take() -> None:
            self.host.prepare(snapshot)
            self._arm(machine)
            if live:
                machine.copy_ram(self.host.vm, snapshot, live=True)
                self._work(work)
                self._give(given)
            self.host.kernel.running = False
            content.append(self.lab.everything())
            machine.copy_ram(self.host.vm, snapshot)
            machine.publish(snapshot)

        try:
            self._run(fuse, take)
            self.taken[snapshot.id] = snapshot, content[0]
        except DiedError:
            machine = self.host.command()
            if any(s.id == snapshot.id for s in machine.snapshots()):
                self.taken[snapshot.id] = snapshot, content[0]
            else:
                machine.drop(self.host.vm, snapshot)
        assert self.lab.everything() == (content[0] if content else self.lab.everything())
        self.host.kernel.running = True

    @precondition(lambda self: self.taken)
    @rule(which=which, fuse=fuses, tracker=st.sampled_from(("auto", "auto", "auto", "uffd", "compare")), load=works,
          work=works, given=discards)  # fmt: skip
    def resets(self, which: int, fuse: int | None, tracker: str, load: Any, work: Any, given: Any) -> None:
        """The guest writes, and gives pages away, after what to write was foreseen; a load writes into RAM too."""
        snapshot, content = self._chosen(which)
        self.host.command()
        self._restored(fuse, lambda: self._reset(snapshot, TrackerKind(tracker), load, work, given))
        assert unlike(self.lab.everything(), content) == []
        assert self.host.machine.audit(self.host.vm, snapshot) == 0
        self.host.kernel.running = True

    @precondition(lambda self: self.taken)
    @rule(which=which, fuse=fuses, first=pages, count=counts, load=works)
    def resets_a_part(self, which: int, fuse: int | None, first: int, count: int, load: Any) -> None:
        """By a scratch snapshot of RAM as it is, into which the part is put."""
        source, content = self._chosen(which)
        first, last = self._within_one_region(first, count)
        machine = self.host.command()
        scratch = replace(self._describe(machine), hidden=True)
        self.host.kernel.running = False
        now = self.lab.everything()
        wanted = now[: first * PAGE] + content[first * PAGE : last * PAGE] + now[last * PAGE :]

        def keep() -> None:
            self.host.prepare(scratch)
            machine.copy_ram(self.host.vm, scratch)
            self._patch(machine, scratch, source, first, last)
            machine.publish(scratch)

        try:
            self._run(fuse, keep)
        except DiedError:
            machine = self.host.command()
            assert self.lab.everything() == now, "nothing was to be touched yet"
            machine.drop(self.host.vm, scratch)
            self.host.kernel.running = True
            return
        self._restored(fuse, lambda: self._reset(scratch, TrackerKind.AUTO, load))
        assert unlike(self.lab.everything(), wanted) == []
        machine = self.host.machine
        try:
            self._run(fuse, lambda: machine.drop(self.host.vm, scratch))
        except DiedError:
            self.host.command().drop(self.host.vm, scratch)
        assert not self.host.folder(scratch.id).exists()
        self.host.kernel.running = True

    @precondition(lambda self: self.taken)
    @rule(which=which, fuse=fuses)
    def deletes(self, which: int, fuse: int | None) -> None:
        snapshot, _ = self._chosen(which)
        machine = self.host.command()
        try:
            self._run(fuse, lambda: machine.drop(self.host.vm, snapshot))
        except DiedError:
            self.host.command().drop(self.host.vm, snapshot)
        del self.taken[snapshot.id]

    @rule(state=st.sampled_from(("lost", "works", "nothing works", "not told", "told")))
    def the_kernel_changes(self, state: str) -> None:
        kernel = self.host.kernel
        self.host.command()
        match state:
            case "lost":
                kernel.lost = "the tracker lost its hold."
            case "works":
                kernel.lost, kernel.works = None, {"uffd"}
                # A tracker that starts anew knows nothing to be clean.
                kernel.written = set(range(PAGES))
            case "nothing works":
                kernel.works = set()
            case "not told":
                kernel.inflations = None
            case "told":
                kernel.inflations = kernel.inflations or 0

    # --- what holds

    @invariant()
    def what_is_there_is_what_was_taken(self) -> None:
        found = self.host.machine.snapshots()
        assert {s.id for s in found} == set(self.taken)
        if not self.taken:
            root = self.host.settings.snapshots_dir
            left = [p.name for p in root.glob("*/*")] if root.exists() else []
            assert left == [], "the last one takes everything with it"

    @invariant()
    def hidden_ones_are_built_on(self) -> None:
        every = self.host.machine.snapshots(hidden=True)
        parents = {s.parent for s in every}
        assert all(s.id in parents for s in every if s.hidden)

    # --- how

    def _chosen(self, which: int) -> tuple[Snapshot, bytes]:
        return list(self.taken.values())[which % len(self.taken)]

    def _describe(self, machine: QemuMachine) -> Snapshot:
        taken = tuple(machine.snapshots())
        return self.host.describe(parent_of(machine.tracking(self.host.vm), taken, machine.binding(self.host.vm)))

    def _arm(self, machine: QemuMachine) -> None:
        state = machine.tracking(self.host.vm)
        if state is None or state.base is None:
            self.host.kernel.running = False
            machine.arm(self.host.vm, TrackerKind.AUTO)
            self.host.kernel.running = True

    def _run(self, fuse: int | None, command: Any) -> None:
        self.host.kernel.fuse = fuse
        try:
            command()
        finally:
            self.host.kernel.fuse = None

    def _restored(self, fuse: int | None, reset: Any) -> None:
        """Died at any point, it is repeated whole by the next command."""
        try:
            self._run(fuse, reset)
        except DiedError:
            self.host.command()
            reset()

    def _reset(self, snapshot: Snapshot, tracker: TrackerKind, load: Any, work: Any = (), given: Any = ()) -> None:
        machine, kernel = self.host.machine, self.host.kernel
        known = machine.tracking(self.host.vm)
        distrusted = known is not None and "uffd" in known.disabled
        if tracker is TrackerKind.UFFD and (kernel.lost or distrusted or "uffd" not in kernel.works):
            tracker = TrackerKind.AUTO  # by its name it would be refused
        machine.ready(self.host.vm, snapshot)
        if kernel.running:
            self._work(work)
            self._give(given)
        kernel.running = False
        machine.restore_ram(self.host.vm, snapshot, tracker)
        self._work(load)
        machine.restore_ram(self.host.vm, snapshot, tracker, after_load=True)

    def _within_one_region(self, first: int, count: int) -> tuple[int, int]:
        end = SIZES[0] if first < SIZES[0] else PAGES
        return first, min(first + count, end)

    def _patch(self, machine: QemuMachine, scratch: Snapshot, source: Snapshot, first: int, last: int) -> None:
        machine.patch_ram(self.host.vm, scratch, source, [self.host.range_of(first, last)])


Commands.TestCase.settings = settings(deadline=None, max_examples=30, stateful_step_count=25)
TestCommands = Commands.TestCase
