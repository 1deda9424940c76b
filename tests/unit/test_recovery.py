"""What becomes of an operation whose owner died, for each kind and phase, as operations.md has it: `begun` undoes,
`touching` finishes or restores what was before, `committed` only cleans up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hvctl.decide.recovery import Answer, answer
from hvctl.model import plan as p
from hvctl.model.allocation import Allocation, DiskLimit, NicLimit, Record
from hvctl.model.operation import Before, Kind, Operation, OpState, Phase
from hvctl.model.pool import Away, Rung
from hvctl.model.reset import AS_USUAL, DiskPart, Scope
from hvctl.model.snapshot import Binding, Range, Snapshot
from hvctl.model.stepwords import step_name
from hvctl.model.tracker import TrackerKind
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
    back: frozenset[str] = frozenset(),
) -> Answer:
    operation = Operation(1, UUID, "a", kind, OpState.OPEN, {}, {}, "me", "host", "boot", "2026-01-01T00:00:00Z")
    return answer(operation, phase, before or BEFORE[kind], now, binding if now else None, snapshots, back=back)


SPOT = replace(RUNNING, record=Record(OLD, interruptible=True))
SAVED, BACK = Record(OLD, interruptible=True), Record(NEW, interruptible=True)
AWAY = Away(UUID, "a", Rung.SAVE, SAVED, OLD, BACK, 0.0, 3600.0, "why", "says who")
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
    Kind.SET: Before(RUNNING, Record(OLD, protected=True), holds=True),
    Kind.INTERRUPT: Before(SPOT, Record(OLD, interruptible=True), away=AWAY, grace=5.0),
    Kind.RESUME: Before(OFF, Record(NEW, interruptible=True), holds=True, away=AWAY),
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
    (Kind.SET, BEGUN, RUNNING, (), UNDONE, ""),
    (Kind.SET, BEGUN, PROTECTED, (), DONE, ""),
    # Its room was promised to somebody: an interruption is done again, unless it may not be any more.
    (Kind.INTERRUPT, BEGUN, SPOT, (), DONE, "notify_guest save_guest clear_nics"),
    (Kind.INTERRUPT, TOUCHING, SPOT, (SNAPSHOT,), DONE, "save_guest clear_nics drop_snapshot"),
    (Kind.INTERRUPT, TOUCHING, OFF, (SNAPSHOT,), DONE, "clear_nics drop_snapshot"),
    (Kind.INTERRUPT, TOUCHING, PROTECTED, (), UNDONE, "notify_guest"),
    (Kind.INTERRUPT, TOUCHING, RUNNING, (), UNDONE, "notify_guest"),
    (Kind.INTERRUPT, TOUCHING, GONE, (), FAILED, "clear_nics"),
    # Whether it came back is seen; then it has what was worked out for it, else it stays away.
    (Kind.RESUME, BEGUN, OFF, (), UNDONE, ""),
    (Kind.RESUME, TOUCHING, OFF, (), UNDONE, ""),
    (Kind.RESUME, TOUCHING, RUNNING, (), DONE,
     "set_cpu_quota set_nic_limit set_memory set_vcpus set_record"),
    (Kind.RESUME, TOUCHING, GONE, (), FAILED, ""),
]  # fmt: skip


# --- a reset of parts, by phase and by what of it was seen
OWN = Range(0x1000, 0x2000)
SCRATCH = replace(SNAPSHOT, id="2", name="scratch", targets={}, hidden=True, parent="1")
PART = Before(RUNNING, None, SNAPSHOT, was_running=True, scratch=SCRATCH)
PARTS: dict[str, Before] = {
    "keep": replace(BEFORE[Kind.RESET], scope=Scope(keep=("vda",))),
    "range": replace(PART, scope=Scope(False, False, (), ranges=(OWN,))),
    "ram": replace(PART, scope=Scope(True, False, ())),
    "devices": replace(PART, scope=Scope(False, True, ())),
    "disk": replace(PART, scope=Scope(False, False, (DiskPart("vda"), DiskPart("vdb"))), scratch=None),
    "replug": replace(
        PART,
        scope=Scope(False, False, (DiskPart("vda"), DiskPart("vdb"))),
        scratch=None,
        plugs={"vda": "<disk/>", "vdb": "<disk/>"},
    ),
    "net": Before(RUNNING, scope=Scope(False, False, (), net=True)),
    "cache": Before(RUNNING, scope=Scope(False, False, (), cache=True)),
}
ALL_BACK, ONE_BACK, NONE_BACK = frozenset({"vda", "vdb"}), frozenset({"vda"}), frozenset()
PARTIAL: list[tuple[str, Phase, Vm | None, frozenset[str], OpState, str]] = [
    ("keep", BEGUN, PAUSED, NONE_BACK, UNDONE, "resume"),
    ("keep", TOUCHING, PAUSED, NONE_BACK, DONE,
     "pause restore_ram load_state restore_ram drop_queues resume restore_balloon set_record"),
    ("keep", COMMITTED, PAUSED, NONE_BACK, DONE, "resume set_record"),
    # The scratch snapshot goes, however it ends; half done, the load is repeated from it.
    *[row for part in ("range", "ram", "devices") for row in (
        (part, BEGUN, RUNNING, NONE_BACK, UNDONE, "drop_snapshot"),
        (part, BEGUN, PAUSED, NONE_BACK, UNDONE, "resume drop_snapshot"),
        (part, TOUCHING, PAUSED, NONE_BACK, DONE,
         "pause restore_ram load_state restore_ram resume drop_snapshot"),
        (part, TOUCHING, RUNNING, NONE_BACK, QUARANTINED, ""),
        (part, TOUCHING, OFF, NONE_BACK, FAILED, "drop_snapshot"),
        (part, TOUCHING, GONE, NONE_BACK, FAILED, "drop_snapshot"),
        (part, COMMITTED, PAUSED, NONE_BACK, DONE, "resume drop_snapshot"),
        (part, COMMITTED, RUNNING, NONE_BACK, DONE, "drop_snapshot"),
    )],
    # The guest of a disk ran on, and may use it again: what was begun is ended, and nothing is begun anew.
    ("disk", BEGUN, RUNNING, NONE_BACK, UNDONE, ""),
    ("disk", TOUCHING, RUNNING, NONE_BACK, UNDONE, "finish_disk finish_disk"),
    ("disk", TOUCHING, RUNNING, ONE_BACK, FAILED, "finish_disk finish_disk"),
    ("disk", TOUCHING, RUNNING, ALL_BACK, DONE, "finish_disk finish_disk"),
    ("disk", TOUCHING, PAUSED, ALL_BACK, DONE, "finish_disk finish_disk resume"),
    ("disk", TOUCHING, OFF, NONE_BACK, FAILED, ""),
    ("disk", COMMITTED, RUNNING, ALL_BACK, DONE, ""),
    # Whatever came of it the guest gets its disks again. Before they are away, a note of an earlier reset says nothing.
    ("replug", BEGUN, RUNNING, NONE_BACK, UNDONE, "plug_disk plug_disk"),
    ("replug", BEGUN, PAUSED, ALL_BACK, UNDONE, "resume plug_disk plug_disk"),
    ("replug", TOUCHING, RUNNING, NONE_BACK, UNDONE, "plug_disk plug_disk"),
    ("replug", TOUCHING, RUNNING, ONE_BACK, FAILED, "plug_disk plug_disk"),
    ("replug", TOUCHING, RUNNING, ALL_BACK, DONE, "plug_disk plug_disk"),
    ("replug", TOUCHING, OFF, ALL_BACK, FAILED, ""),
    ("replug", COMMITTED, RUNNING, ALL_BACK, DONE, ""),
    # What needs no snapshot: bandwidth and memory are as promised.
    ("net", BEGUN, RUNNING, NONE_BACK, UNDONE, "set_nic_limit set_nic_limit"),
    ("net", BEGUN, OFF, NONE_BACK, FAILED, ""),
    ("cache", BEGUN, RUNNING, NONE_BACK, UNDONE, "set_memory"),
    ("cache", BEGUN, GONE, NONE_BACK, FAILED, ""),
]  # fmt: skip


@pytest.mark.parametrize(("part", "phase", "now", "back", "state", "effects"), PARTIAL)
def test_the_answer_of_a_reset_of_parts(
    part: str, phase: Phase, now: Vm | None, back: frozenset[str], state: OpState, effects: str
) -> None:
    found = ended(Kind.RESET, phase, now, PARTS[part], snapshots=(SNAPSHOT, SCRATCH), back=back)
    assert (found.state, names(found)) == (state, effects)
    assert found.reason
    order = found.steps
    enters = [s.phase for s in order if isinstance(s, p.Enter)]
    assert enters == ([COMMITTED] if part != "keep" else [TOUCHING, COMMITTED]) * ("load_state" in effects)
    for load in (s for s in order if isinstance(s, p.LoadState)):
        assert load.nodes == ()
        assert load.snapshot == (SNAPSHOT if part in ("devices", "keep") else SCRATCH)
    assert all(s.snapshot == (SNAPSHOT if part == "keep" else SCRATCH) for s in order if isinstance(s, p.RestoreRam))
    assert all(s.snapshot == SCRATCH for s in order if isinstance(s, p.DropSnapshot))
    assert not [s for s in order if isinstance(s, p.RunInGuest)], "its hooks may have run"


def test_every_part_has_an_answer_in_every_phase() -> None:
    seen = {(row[0], row[1]) for row in PARTIAL}
    whole = {(part, phase) for part in PARTS for phase in (BEGUN, TOUCHING, COMMITTED)}
    # Without an irreversible step there is only one phase.
    assert whole - seen == {(part, phase) for part in ("net", "cache") for phase in (TOUCHING, COMMITTED)}


def test_a_reset_that_is_repeated_uses_a_tracker_that_works() -> None:
    before = BEFORE[Kind.RESET]
    asked = replace(before, wishes=replace(before.wishes, tracker=TrackerKind.SOFT_DIRTY, audit=True))
    steps = ended(Kind.RESET, TOUCHING, PAUSED, asked, snapshots=(SNAPSHOT,)).steps
    assert {s.tracker for s in steps if isinstance(s, p.RestoreRam)} == {TrackerKind.AUTO}
    assert [s for s in steps if isinstance(s, p.Audit)], "what was to be proven is"


def test_a_guest_that_goes_on_after_a_reset_gets_the_present_whoever_lets_it_go_on() -> None:
    for wishes in (AS_USUAL, replace(AS_USUAL, reseed=False, clock=False)):
        for phase in (TOUCHING, COMMITTED):
            before = replace(BEFORE[Kind.RESET], wishes=wishes)
            (resume,) = [s for s in ended(Kind.RESET, phase, PAUSED, before).steps if isinstance(s, p.Resume)]
            assert (resume.greet, resume.clock) == (wishes.reseed, wishes.clock)
        # What was only to be written, and was not, leaves the guest as it was.
        (resume,) = [s for s in ended(Kind.RESET, BEGUN, PAUSED, before).steps if isinstance(s, p.Resume)]
        assert not resume.greet


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
        (Kind.INTERRUPT, TOUCHING, OFF, "goal"),
        (Kind.INTERRUPT, TOUCHING, GONE, "as before"),
        (Kind.INTERRUPT, TOUCHING, RUNNING, "as before"),
        (Kind.RESUME, TOUCHING, RUNNING, "goal"),
        (Kind.RESUME, TOUCHING, OFF, "as before"),
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
