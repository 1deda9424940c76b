"""What --only and --keep name, and how coherent a guest is that goes back in only those parts."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvctl.decide.reset import plan_reset
from hvctl.decide.scope import PARTS, classify, disk_of, disk_targets, each_disk, parse_range, parse_scope
from hvctl.errors import UsageError
from hvctl.model.allocation import Allocation, DiskLimit, NicLimit
from hvctl.model.plan import Plan, Refusal
from hvctl.model.reset import AS_USUAL, WHOLE, Coherence, DiskPart, Hooks, Scope
from hvctl.model.snapshot import Binding, Range, Snapshot
from hvctl.model.tracker import TrackerKind
from hvctl.model.vm import Disk, Process, Region, Vm
from unit.vms import MIB, vm_with

DISKS = (
    Disk("vda", "root", "/d/vda", "qcow2", True, "node-vda"),
    Disk("vdb", "results", "/d/vdb", "qcow2", True, "node-vdb"),
    Disk("vdc", "image", "/d/vdc", "raw", False, "node-vdc"),
)
BINDING = Binding(Process(7, 8, "boot"), ("cpu0",), ("disk vda node-vda", "disk vdb node-vdb"))
VM = replace(
    vm_with(Allocation(1, 256 * MIB, nics=(NicLimit("m"),), disks=(DiskLimit("vda"), DiskLimit("vdb")))), disks=DISKS
)
SNAPSHOT = Snapshot(
    "1", "s", VM.uuid, "2026-01-01T00:00:00Z", BINDING, "tag", {"vda": "node-vda", "vdb": "node-vdb"}, "state", "/s/1",
    (Region("ram", "/ram", 1024 * MIB),), 256 * MIB, 1, 0, owned=(Range(0x1000, 0x9000),), mounted=("vda",),
)  # fmt: skip
SCRATCH = replace(SNAPSHOT, id="2", name="scratch", targets={}, hidden=True, parent="1", folder="/s/2")
COHERENT, CRASH, INCOHERENT = Coherence.COHERENT, Coherence.CRASH_CONSISTENT, Coherence.INCOHERENT


# --- words


@pytest.mark.parametrize(
    ("only", "scope"),
    [
        ("", WHOLE),
        ("ram", Scope(True, False, ())),
        ("devices", Scope(False, True, ())),
        ("ram,devices", Scope(True, True, ())),
        ("ram,devices,disks", Scope(True, True, None)),
        ("disks", Scope(False, False, None)),
        ("net,cache", Scope(False, False, (), cache=True, net=True)),
        ("disk:vdb", Scope(False, False, (DiskPart("vdb"),))),
        ("disk:vdb,disk:vdc", Scope(False, False, (DiskPart("vdb"), DiskPart("vdc")))),
        ("disk:vdb:0-64KiB", Scope(False, False, (DiskPart("vdb", Range(0, 65536)),))),
        ("disk:vdb:0x200-1MiB", Scope(False, False, (DiskPart("vdb", Range(512, MIB)),))),
        ("ram:0x1000-0x2000", Scope(False, False, (), ranges=(Range(0x1000, 0x2000),))),
        ("ram:0-4KiB,ram:0x8000-0x9000,net",
         Scope(False, False, (), ranges=(Range(0, 4096), Range(0x8000, 0x9000)), net=True)),
    ],
)  # fmt: skip
def test_the_parts_that_are_named(only: str, scope: Scope) -> None:
    assert parse_scope([only]) == scope
    assert parse_scope(only.split(",")) == scope, "several options are as several words"
    assert not scope.needs_snapshot or scope.ram or scope.devices or scope.disks != () or scope.ranges


def test_what_is_kept() -> None:
    assert parse_scope([], ["disk:results", "vda,disk:vdb"]) == Scope(keep=("results", "vda", "vdb"))
    assert not parse_scope(["net,cache"]).needs_snapshot
    assert parse_scope(["disks"]).needs_snapshot


@pytest.mark.parametrize(
    "only",
    [
        "everything", "RAM", "disk", "disk:", "ram:", "ram:0x1000", "ram:0x2000-0x1000", "ram:0-0", "ram:1000-2000",
        "ram:-0x1000", "ram:0x1000-", "ram:0xzz-0x1", "ram:0x-0x10", "disk:vdb:", "disk:vdb:5-1KiB", "disk:vdb:0-5",
        "disk:vdb:1KiB-1KiB", "disks:vdb", "cache:1", "net:eth0", "devices:vga", "ram,ram:0-4KiB", "disks,disk:vdb",
        "ram:0x1000-0x2000-0x3000", "disk:vdb:0-1KiB:2", "ram:0x1000 - 0x2000",
    ],
)  # fmt: skip
def test_words_that_mean_nothing_are_usage_errors(only: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_scope([only])
    assert refused.value.message.endswith(".")
    word = only.split(",")[-1]
    # It names the word, or says what the words together would mean.
    assert repr(word) in refused.value.message or "says nothing more" in refused.value.message
    if word.partition(":")[0] not in ("ram", "disk", "disks") or ":" not in word:
        assert "says nothing more" in refused.value.message or refused.value.hint == f"parts: {PARTS}"


def test_a_range_tells_how_it_is_written() -> None:
    with pytest.raises(UsageError) as refused:
        parse_range("12-13", "12-13")
    assert refused.value.hint is not None
    assert "START-END" in refused.value.hint
    assert parse_range("0x8000000-256MiB", "") == Range(128 * MIB, 256 * MIB)
    assert parse_range("0-1KiB", "") == Range(0, 1024)


def test_what_goes_back_and_what_does_not_are_not_both_said() -> None:
    with pytest.raises(UsageError, match="one of them"):
        parse_scope(["ram"], ["disk:vdb"])


words = st.lists(st.sampled_from(("ram", "devices", "disks", "net", "cache", "disk:a", "ram:0-4KiB")), max_size=4)


@given(words)
def test_order_and_repetition_do_not_matter_to_a_scope(parts: list[str]) -> None:
    try:
        scope = parse_scope([",".join(parts)])
    except UsageError:
        with pytest.raises(UsageError):
            parse_scope(parts[::-1])
        return
    again = parse_scope(parts[::-1])
    assert (scope.ram, scope.devices, scope.cache, scope.net) == (again.ram, again.devices, again.cache, again.net)
    assert scope.disks == again.disks


# --- disks


def test_a_disk_has_its_target_and_its_serial() -> None:
    assert disk_of(VM, "vdb") == disk_of(VM, "results") == DISKS[1]
    for name, why in (("vdc", "read-only"), ("image", "read-only"), ("vdz", "no disk")):
        found = disk_of(VM, name)
        assert isinstance(found, Refusal)
        assert why in found.message
    missing = disk_of(VM, "vdz")
    assert isinstance(missing, Refusal)
    assert missing.hint is not None
    assert "vda, vdb" in missing.hint


@given(st.booleans(), st.booleans(), st.booleans())
def test_all_disks_are_each_disk_unless_the_whole_vm_goes_back(ram: bool, devices: bool, named: bool) -> None:
    scope = Scope(ram, devices, (DiskPart("vdb"),) if named else None)
    each = each_disk(VM, scope)
    if named or (ram and devices):
        assert each == scope
    else:
        assert each.disks == (DiskPart("vda"), DiskPart("vdb"))
        assert disk_targets(VM, each) == ("vda", "vdb")
    assert each_disk(VM, each) == each


# --- coherence

ALONE = [
    # With RAM and devices: what stays must have been unused at the time of the snapshot.
    ("", (), None, COHERENT),
    ("", ("results",), None, COHERENT),
    ("", ("vdb",), None, COHERENT),
    ("", ("vda",), None, INCOHERENT),
    ("", ("vda", "vdb"), None, INCOHERENT),
    ("ram,devices,disks", (), None, COHERENT),
    ("ram,devices,disk:vda", (), None, COHERENT),
    ("ram,devices,disk:root", (), None, COHERENT),
    ("ram,devices,disk:vdb", (), None, INCOHERENT),
    ("ram,devices", (), None, INCOHERENT),
    # One of the two without the other.
    ("ram", (), frozenset(), INCOHERENT),
    ("devices", (), frozenset(), INCOHERENT),
    ("devices,ram:0x1000-0x2000", (), frozenset(), INCOHERENT),
    # Memory that an application owns, and only that.
    ("ram:0x1000-0x9000", (), None, COHERENT),
    ("ram:0x2000-0x3000,ram:0x4000-0x5000", (), None, COHERENT),
    ("ram:0x1000-0x9001", (), None, INCOHERENT),
    ("ram:0xfff-0x2000", (), None, INCOHERENT),
    ("ram:0x2000-0x3000,ram:0xa000-0xb000", (), None, INCOHERENT),
    # A disk alone: the guest must have let go of it now, and have said so.
    ("disk:vdb", (), frozenset(), COHERENT),
    ("disk:vdb", (), frozenset({"vda"}), COHERENT),
    ("disk:results", (), frozenset({"vdb"}), INCOHERENT),
    ("disk:vdb", (), None, INCOHERENT),
    ("disk:vda,disk:vdb", (), frozenset({"vda"}), INCOHERENT),
    ("disk:vdb:0-64KiB", (), frozenset(), CRASH),
    ("disk:vdb:0-64KiB", (), frozenset({"vdb"}), INCOHERENT),
    ("disk:vdb:0-64KiB", (), None, INCOHERENT),
    ("disk:vda,disk:vdb:0-64KiB", (), frozenset(), CRASH),
    # What is of no moment of the guest.
    ("net", (), None, COHERENT),
    ("cache", (), None, COHERENT),
    ("net,cache", (), None, COHERENT),
]


@pytest.mark.parametrize(("only", "keep", "in_use", "expected"), ALONE)
def test_how_coherent_a_request_is(
    only: str, keep: tuple[str, ...], in_use: frozenset[str] | None, expected: Coherence
) -> None:
    scope = parse_scope([only] if only else [], keep)
    found, reasons = classify(VM, SNAPSHOT, scope, in_use)
    assert found is expected
    assert bool(reasons) == (expected is not COHERENT), "the reason is said"
    plan = plan_reset(VM, SNAPSHOT, BINDING, scope, replace(AS_USUAL, audit=False), in_use, SCRATCH)
    if expected is INCOHERENT:
        assert isinstance(plan, Refusal)
        assert all(r in plan.message for r in reasons)
        assert plan.hint is not None
        assert "--accept-incoherent" in plan.hint
        # After a reset libvirt lets nobody talk to the agent for a second.
        assert ("repeat it in a second" in plan.hint) is (bool(scope.disks) and in_use is None and VM.has_agent)
    else:
        assert not isinstance(plan, Refusal)
        assert plan[1] is expected
        assert set(reasons) <= set(plan[0].reasons)


def test_what_was_not_said_at_the_snapshot_counts_as_used() -> None:
    silent = replace(SNAPSHOT, mounted=None)
    assert classify(VM, silent, Scope(keep=("vdb",)), frozenset())[0] is INCOHERENT
    assert classify(VM, silent, WHOLE, None)[0] is COHERENT
    idle = replace(SNAPSHOT, mounted=())
    assert classify(VM, idle, Scope(True, True, ()), None)[0] is COHERENT


SCOPES = st.builds(
    Scope,
    ram=st.booleans(),
    devices=st.booleans(),
    disks=st.none()
    | st.lists(
        st.builds(DiskPart, st.sampled_from(("vda", "root", "vdb", "results")), st.none() | st.just(Range(0, 4096))),
        max_size=2,
    ).map(tuple),
    keep=st.sampled_from(((), ("vda",), ("results",))),
    ranges=st.sampled_from(((), (Range(0x1000, 0x2000),), (Range(0, 0x2000),))),
    cache=st.booleans(),
    net=st.booleans(),
)
IN_USE = st.none() | st.sets(st.sampled_from(("vda", "vdb"))).map(frozenset)
WISHES = st.builds(
    replace,
    st.just(AS_USUAL),
    tracker=st.sampled_from(TrackerKind),
    audit=st.booleans(),
    accept_incoherent=st.booleans(),
    clock=st.booleans(),
    reseed=st.booleans(),
    hooks=st.sampled_from((Hooks(), Hooks((("umount",),), (("mount",),)))),
)


@given(SCOPES, IN_USE, WISHES)
def test_what_is_incoherent_is_planned_only_when_it_is_accepted(scope: Scope, in_use: object, wishes: object) -> None:
    plan = planned(VM, scope, wishes, in_use)
    if isinstance(plan, Refusal):
        return
    released = bool(wishes.hooks.before) and bool(each_disk(VM, scope).disks)  # type: ignore[attr-defined]
    if classify(VM, SNAPSHOT, each_disk(VM, scope), in_use)[0] is INCOHERENT:  # type: ignore[arg-type]
        # Hooks that have the guest let go are believed when the guest says so after them.
        checked = any(type(s).__name__ == "CheckReleased" for s in plan[0].steps)
        assert wishes.accept_incoherent or (released and checked)  # type: ignore[attr-defined]


def planned(vm: Vm, scope: Scope, wishes: object, in_use: object) -> tuple[Plan, Coherence] | Refusal:
    return plan_reset(vm, SNAPSHOT, BINDING, each_disk(vm, scope), wishes, in_use, SCRATCH)  # type: ignore[arg-type]


def test_every_combination_has_an_answer() -> None:
    for ram, devices, disks, ranges in product(
        (False, True), (False, True), (None, (), (DiskPart("vda"),), (DiskPart("vdb", Range(0, 512)),)),
        ((), (Range(0x1000, 0x2000),)),
    ):  # fmt: skip
        scope = Scope(ram, devices, disks, (), ranges)
        for accept in (False, True):
            answer = planned(VM, scope, replace(AS_USUAL, audit=False, accept_incoherent=accept), frozenset())
            assert isinstance(answer, Refusal) or answer[0].steps or not scope.needs_snapshot
