"""What becomes of an operation whose owner died, for each kind and phase, as operations.md has it: `begun` undoes,
`touching` finishes or restores what was before, `committed` only cleans up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hvctl.decide.recovery import Answer, answer
from hvctl.model import plan as p
from hvctl.model.allocation import Allocation, DiskLimit, NicLimit, Record
from hvctl.model.operation import Before, Kind, Operation, OpState, Phase
from hvctl.model.snapshot import Binding, Snapshot
from hvctl.model.stepwords import step_name
from hvctl.model.vm import Process, Region, State, Vm
from unit.vms import MIB, vm_with

NICS = (NicLimit("52:54:00:00:00:01"), NicLimit("52:54:00:00:00:02"))
DISKS = (DiskLimit("vda"), DiskLimit("vdb"))
OLD = Allocation(1, 256 * MIB, nics=NICS, disks=DISKS)
NEW = Allocation(2, 512 * MIB, 150, nics=(NicLimit(NICS[0].mac, 10**6), NICS[1]), disks=DISKS)
RUNNING = replace(vm_with(OLD), record=Record(OLD))
PAUSED = replace(RUNNING, state=State.PAUSED, reason="user")
OFF = replace(RUNNING, state=State.OFF, reason="shutdown", process=None)
GONE = None
HALF = replace(RUNNING, allocation=replace(OLD, vcpus=2, memory=512 * MIB))
ALL = replace(RUNNING, allocation=NEW, record=Record(NEW))
UUID = RUNNING.uuid
BINDING = Binding(Process(7, 8, "boot"), ("cpu0",), ("node=/d",))
SNAPSHOT = Snapshot(
    "1", "s", UUID, "2026-01-01T00:00:00Z", BINDING, "tag", {"vda": "node"}, "state", "/s/1",
    (Region("ram", "/ram", 1024 * MIB),), 256 * MIB, 1, 0,
)  # fmt: skip
BEGUN, TOUCHING, COMMITTED = Phase.BEGUN, Phase.TOUCHING, Phase.COMMITTED
DONE, UNDONE, FAILED, QUARANTINED = OpState.DONE, OpState.UNDONE, OpState.FAILED, OpState.QUARANTINED


def ended(
    kind: Kind,
    phase: Phase,
    now: Vm | None,
    before: Before | None = None,
    binding: Binding | None = BINDING,
    snapshots: tuple[Snapshot, ...] = (),
) -> Answer:
    operation = Operation(1, UUID, "a", kind, OpState.OPEN, {}, {}, "me", "host", "boot", "2026-01-01T00:00:00Z")
    return answer(operation, phase, before or BEFORE[kind], now, binding if now else None, snapshots)


BEFORE: dict[Kind, Before] = {
    Kind.CREATE: Before(goal=Record(OLD), holds=True),
    Kind.START: Before(OFF, Record(OLD), holds=True),
    Kind.STOP: Before(RUNNING, Record(OLD)),
    Kind.DELETE: Before(RUNNING),
    Kind.ADOPT: Before(RUNNING, Record(OLD), xml="<domain/>"),
    Kind.PROTECT: Before(RUNNING, Record(OLD, protected=True), holds=True),
    Kind.ALLOCATE: Before(RUNNING, Record(NEW), holds=True, wanted=NEW),
    Kind.SNAPSHOT_TAKE: Before(RUNNING, snapshot=SNAPSHOT, was_running=True),
    Kind.SNAPSHOT_DELETE: Before(RUNNING, snapshot=SNAPSHOT),
    Kind.SNAPSHOT_SAVE: Before(RUNNING, snapshot=SNAPSHOT, archive="/archive"),
    Kind.SNAPSHOT_LOAD: Before(OFF, Record(OLD), SNAPSHOT, holds=True, archive="/archive", load="7"),
    Kind.RESET: Before(RUNNING, Record(OLD), SNAPSHOT, was_running=True, holds=True),
}
PROTECTED = replace(RUNNING, record=Record(OLD, protected=True))

# kind, phase, what is seen, snapshots there are; how it ends, and the effects that lead there, in their order.
TABLE: list[tuple[Kind, Phase, Vm | None, tuple[Snapshot, ...], OpState, str]] = [
    # A VM that was half made is removed, as if never asked for; whole, it stays.
    (Kind.CREATE, BEGUN, GONE, (), UNDONE, "destroy clear_nics undefine remove_files"),
    (Kind.CREATE, TOUCHING, OFF, (), UNDONE, "destroy clear_nics undefine remove_files"),
    (Kind.CREATE, TOUCHING, RUNNING, (), UNDONE, "destroy clear_nics undefine remove_files"),
    (Kind.CREATE, COMMITTED, RUNNING, (), DONE, ""),
    # A deletion that has begun to delete is finished, its process before its files.
    (Kind.DELETE, BEGUN, RUNNING, (SNAPSHOT,), UNDONE, ""),
    (Kind.DELETE, TOUCHING, RUNNING, (SNAPSHOT,), DONE, "destroy clear_nics drop_snapshot undefine remove_files"),
    (Kind.DELETE, TOUCHING, GONE, (), DONE, "destroy clear_nics undefine remove_files"),
    (Kind.DELETE, TOUCHING, PROTECTED, (), QUARANTINED, ""),
    # Whether a VM was started or stopped is seen, not remembered.
    (Kind.START, BEGUN, OFF, (), UNDONE, ""),
    (Kind.START, TOUCHING, OFF, (), UNDONE, ""),
    (Kind.START, TOUCHING, GONE, (), UNDONE, ""),
    (Kind.START, TOUCHING, RUNNING, (), DONE, ""),
    (Kind.START, TOUCHING, replace(RUNNING, record=Record(NEW)), (), DONE, "set_nic_limit"),
    (Kind.STOP, BEGUN, RUNNING, (), UNDONE, ""),
    (Kind.STOP, TOUCHING, RUNNING, (SNAPSHOT,), UNDONE, ""),
    (Kind.STOP, TOUCHING, OFF, (SNAPSHOT,), DONE, "clear_nics drop_snapshot"),
    # All new or all old, by what is in force.
    (Kind.ALLOCATE, BEGUN, RUNNING, (), UNDONE, ""),
    (Kind.ALLOCATE, TOUCHING, RUNNING, (), UNDONE, ""),
    (Kind.ALLOCATE, TOUCHING, HALF, (), UNDONE, "set_memory set_vcpus"),
    (Kind.ALLOCATE, TOUCHING, ALL, (), DONE, ""),
    (Kind.ALLOCATE, TOUCHING, replace(ALL, record=Record(OLD)), (), UNDONE,
     "set_memory set_vcpus set_cpu_quota set_nic_limit"),
    (Kind.ALLOCATE, TOUCHING, GONE, (), FAILED, ""),
    (Kind.ADOPT, TOUCHING, RUNNING, (), UNDONE, "redefine remove_files"),
    (Kind.ADOPT, BEGUN, GONE, (), UNDONE, ""),
    (Kind.PROTECT, BEGUN, RUNNING, (), UNDONE, ""),
    (Kind.PROTECT, BEGUN, PROTECTED, (), DONE, ""),
    # A snapshot exists if and only if its manifest does; the guest runs again in either case.
    (Kind.SNAPSHOT_TAKE, BEGUN, RUNNING, (), UNDONE, "drop_snapshot"),
    (Kind.SNAPSHOT_TAKE, TOUCHING, PAUSED, (), UNDONE, "drop_snapshot resume"),
    (Kind.SNAPSHOT_TAKE, TOUCHING, PAUSED, (SNAPSHOT,), DONE, "resume"),
    (Kind.SNAPSHOT_TAKE, COMMITTED, PAUSED, (SNAPSHOT,), DONE, "resume"),
    (Kind.SNAPSHOT_TAKE, COMMITTED, RUNNING, (SNAPSHOT,), DONE, ""),
    (Kind.SNAPSHOT_TAKE, TOUCHING, GONE, (), UNDONE, "drop_snapshot"),
    (Kind.SNAPSHOT_DELETE, TOUCHING, RUNNING, (SNAPSHOT,), DONE, "drop_snapshot"),
    (Kind.SNAPSHOT_DELETE, TOUCHING, RUNNING, (), DONE, "drop_snapshot"),
    # A saved snapshot is whole or not there; a load that did not come to its end leaves the disks from before it.
    (Kind.SNAPSHOT_SAVE, TOUCHING, RUNNING, (SNAPSHOT,), UNDONE, "drop_archive"),
    (Kind.SNAPSHOT_LOAD, BEGUN, OFF, (), UNDONE, "return_disks remove_import"),
    # One that is still of the process in which it was saved is none of the load's.
    (Kind.SNAPSHOT_LOAD, TOUCHING, OFF, (SNAPSHOT,), UNDONE, "return_disks"),
    (Kind.SNAPSHOT_LOAD, TOUCHING, RUNNING, (), UNDONE, "return_disks remove_import"),
    (Kind.SNAPSHOT_LOAD, COMMITTED, GONE, (SNAPSHOT,), FAILED, "release_disks drop_snapshot"),
    # Warm reset: undo, redo the whole of it, or finish without redoing.
    (Kind.RESET, BEGUN, RUNNING, (SNAPSHOT,), UNDONE, ""),
    (Kind.RESET, BEGUN, PAUSED, (SNAPSHOT,), UNDONE, "resume"),
    (Kind.RESET, TOUCHING, PAUSED, (SNAPSHOT,), DONE,
     "pause restore_ram load_state restore_ram drop_queues resume restore_balloon set_record"),
    (Kind.RESET, TOUCHING, RUNNING, (SNAPSHOT,), QUARANTINED, ""),
    (Kind.RESET, TOUCHING, OFF, (SNAPSHOT,), FAILED, ""),
    (Kind.RESET, TOUCHING, GONE, (), FAILED, ""),
    (Kind.RESET, COMMITTED, PAUSED, (SNAPSHOT,), DONE, "resume set_record"),
    (Kind.RESET, COMMITTED, RUNNING, (SNAPSHOT,), DONE, "set_record"),
    (Kind.RESET, COMMITTED, GONE, (), FAILED, ""),
]  # fmt: skip


def names(found: Answer) -> str:
    return " ".join(step_name(s) for s in found.steps if not isinstance(s, p.Enter))


@pytest.mark.parametrize(("kind", "phase", "now", "snapshots", "state", "effects"), TABLE)
def test_the_answer_of_each_kind_in_each_phase(
    kind: Kind, phase: Phase, now: Vm | None, snapshots: tuple[Snapshot, ...], state: OpState, effects: str
) -> None:
    found = ended(kind, phase, now, snapshots=snapshots)
    assert (found.state, names(found)) == (state, effects)
    assert found.reason, "the journal says why"
    assert found.goal_holds <= (state is DONE), "only what was done is promised"


def test_every_kind_has_its_rows() -> None:
    assert {row[0] for row in TABLE} == set(Kind)


@pytest.mark.parametrize(
    ("kind", "phase", "now", "holds"),
    [
        (Kind.CREATE, COMMITTED, RUNNING, "goal"),
        (Kind.CREATE, TOUCHING, RUNNING, "nothing"),
        (Kind.DELETE, TOUCHING, RUNNING, "nothing"),
        (Kind.DELETE, BEGUN, RUNNING, "as before"),
        (Kind.DELETE, TOUCHING, PROTECTED, "as before"),
        (Kind.START, TOUCHING, RUNNING, "goal"),
        (Kind.START, TOUCHING, OFF, "as before"),
        (Kind.STOP, TOUCHING, OFF, "goal"),
        (Kind.STOP, TOUCHING, RUNNING, "as before"),
        (Kind.ALLOCATE, TOUCHING, ALL, "goal"),
        (Kind.ALLOCATE, TOUCHING, HALF, "as before"),
        (Kind.ALLOCATE, TOUCHING, GONE, "as before"),
        (Kind.PROTECT, BEGUN, PROTECTED, "goal"),
        (Kind.SNAPSHOT_TAKE, COMMITTED, PAUSED, "as before"),
        (Kind.RESET, TOUCHING, PAUSED, "goal"),
        (Kind.RESET, COMMITTED, RUNNING, "goal"),
        (Kind.RESET, TOUCHING, RUNNING, "as before"),
        (Kind.RESET, TOUCHING, GONE, "as before"),
    ],
)
def test_what_is_promised_after(kind: Kind, phase: Phase, now: Vm | None, holds: str) -> None:
    """A VM that cannot be seen keeps its promise; only what was surely removed is forgotten."""
    found = ended(kind, phase, now)
    assert (found.goal_holds, found.forget) == {
        "goal": (True, False), "nothing": (False, True), "as before": (False, False)
    }[holds]  # fmt: skip


def test_the_undone_allocation_goes_back_to_what_was() -> None:
    found = ended(Kind.ALLOCATE, TOUCHING, HALF)
    assert p.SetVcpus(UUID, 1) in found.steps
    (memory,) = [s for s in found.steps if isinstance(s, p.SetMemory)]
    assert (memory.target, memory.best_effort) == (256 * MIB, True), "recovery takes what the guest gives"


def test_a_guest_that_went_off_gets_its_definition_back() -> None:
    now = replace(OFF, allocation=NEW, record=Record(NEW))
    found = ended(
        Kind.ALLOCATE,
        TOUCHING,
        now,
        Before(RUNNING, Record(replace(NEW, cpu_weight=5)), holds=True, wanted=replace(NEW, cpu_weight=5)),
    )
    assert found.state is UNDONE
    assert set(names(found).split()) == {"set_memory", "set_vcpus", "set_cpu_quota", "set_record"}


def test_a_record_that_was_not_there_before_goes() -> None:
    foreign = replace(RUNNING, record=None)
    now = replace(HALF, record=Record(NEW))
    found = ended(Kind.ALLOCATE, TOUCHING, now, Before(foreign, Record(NEW), holds=True, wanted=NEW))
    assert found.steps[-1] == p.SetRecord(UUID, None)


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("kind", [Kind.SNAPSHOT_TAKE, Kind.RESET])
def test_a_vm_that_was_paused_before_stays_paused(kind: Kind, phase: Phase) -> None:
    before = replace(BEFORE[kind], vm=PAUSED, was_running=False)
    found = ended(kind, phase, PAUSED, before, snapshots=(SNAPSHOT,))
    assert "resume" not in names(found)
    assert found.state is (UNDONE if kind is Kind.RESET and phase is BEGUN else DONE)


def test_a_redone_reset_touches_before_it_writes_and_commits_before_it_runs() -> None:
    steps = ended(Kind.RESET, TOUCHING, PAUSED, snapshots=(SNAPSHOT,)).steps
    order = [step_name(s) if not isinstance(s, p.Enter) else s.phase.value for s in steps]
    assert order.index("pause") < order.index("touching") < order.index("restore_ram") < order.index("load_state")
    assert order.index("load_state") < order.index("committed") < order.index("resume")
    assert order[order.index("load_state") + 1] == "restore_ram", "the load itself writes into RAM"


@pytest.mark.parametrize("phase", [TOUCHING, COMMITTED])
def test_a_reset_of_another_process_is_over(phase: Phase) -> None:
    other = replace(BINDING, process=Process(9, 9, "boot"))
    found = ended(Kind.RESET, phase, replace(PAUSED, process=other.process), binding=other, snapshots=(SNAPSHOT,))
    assert (found.state, found.steps) == (FAILED, ())


def test_a_reset_that_does_not_fit_any_more_is_not_repeated() -> None:
    other = replace(BINDING, devices=("cpu0", "usb0"))
    found = ended(Kind.RESET, TOUCHING, PAUSED, binding=other, snapshots=(SNAPSHOT,))
    assert (found.state, found.steps) == (QUARANTINED, ())
    assert "usb0" in found.reason


def test_another_snapshot_is_not_the_one_that_was_taken() -> None:
    other = replace(SNAPSHOT, id="2", name="other")
    found = ended(Kind.SNAPSHOT_TAKE, TOUCHING, PAUSED, snapshots=(other,))
    assert found.state is UNDONE
    assert found.steps[0] == p.DropSnapshot(SNAPSHOT)
