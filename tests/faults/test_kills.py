"""kill -9 of hvctl at every fault point of every kind of operation, then recovery: the contract holds."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from faults.command import FakeSite
from hvctl.adapters.fake.state import RAM_BYTES
from hvctl.decide.admission import holders
from hvctl.decide.reservations import FOREVER, kept_by_others
from hvctl.engine.handover import capacity
from hvctl.engine.lock import free
from hvctl.engine.observe import observe_all
from hvctl.engine.operate import Engine
from hvctl.engine.runtime import open_engine
from hvctl.model.allocation import Resources
from hvctl.model.image import DefaultDisk, Image
from hvctl.model.pool import Held, Rung
from hvctl.model.tracker import TrackerKind
from hvctl.model.vm import State
from hvctl.operations.journal import recover

pytestmark = pytest.mark.processes

MIB = 1 << 20
ARCHIVE = "/saved-on-a-fake-host"
Content = dict[str, str]


def engine_points(kind: str) -> list[str]:
    return [f"{kind}:{step}:after" for step in ("row", "begun", "closed")]


@dataclass(frozen=True)
class Case:
    """An operation: the world before it, the command, its steps in their order, its phases, and how its success is
    seen. A step that comes again is another point to be killed at."""

    kind: str
    argv: Sequence[str]
    steps: Sequence[str]
    prepare: Callable[[FakeSite], Any]
    happened: Callable[[FakeSite], bool]
    phases: Sequence[str] = ("touching",)
    name: str = ""

    @property
    def points(self) -> list[str]:
        seen: Counter[str] = Counter()
        numbered = []
        for step in self.steps:
            seen[step] += 1
            numbered.append(step if seen[step] == 1 else f"{step}#{seen[step]}")
        places = itertools.product([*numbered, *self.phases], ("before", "after"))
        return [*engine_points(self.kind), *(f"{self.kind}:{step}:{when}" for step, when in places)]


def _image(site: FakeSite) -> None:
    """A built image as far as `create` reads it; the fake host makes no disk of it."""
    from hvctl import codec

    folder = site.settings.images_dir / "micro-000000000000"
    folder.mkdir(parents=True, mode=0o711)
    for name in ("kernel", "initrd"):
        (folder / name).write_text("")
    image = Image(
        "micro",
        "0" * 64,
        str(folder / "kernel"),
        str(folder / "initrd"),
        "",
        None,
        None,
        None,
        0,
        "2026-01-01T00:00:00Z",
        0,
        (DefaultDisk("data", 64 * MIB),),
    )
    (folder / "image.json").write_text(json.dumps(codec.dump(image)))


def _vm(site: FakeSite, running: bool = True) -> None:
    _image(site)
    start = ("--start",) if running else ()
    done = site.run("vm", "create", "a", "--image", "micro", "--nic", "br0", *start)
    assert done.returncode == 0, done.stderr


def _taken(site: FakeSite, *options: str, **behaviour: Any) -> None:
    """A snapshot of a guest that worked before it and works since."""
    _vm(site)
    site.world.set_behaviour("a", **behaviour)
    site.world.spoil("a", "first")
    _keep(site, "taken")
    done = site.run("snapshot", "take", "a", "s", *options)
    assert done.returncode == 0, done.stderr
    site.world.spoil("a")
    _keep(site, "before")


def _without_pulse(site: FakeSite) -> None:
    _vm(site)
    site.world.unplug_pulse("a")
    _keep(site, "taken")
    assert site.run("snapshot", "take", "a", "s").returncode == 0
    site.world.spoil("a")
    _keep(site, "before")


def _with_child(site: FakeSite) -> None:
    _taken(site)
    assert site.run("snapshot", "take", "a", "t").returncode == 0


def _with_hidden_parent(site: FakeSite) -> None:
    _with_child(site)
    assert site.run("snapshot", "delete", "a", "s").returncode == 0
    assert _hidden(site) == ["s"]


def _saved(site: FakeSite) -> None:
    """A snapshot saved at once, then work, then another process, which boots from other disks."""
    _taken(site)
    assert site.run("snapshot", "save", "a", "s", "--to", ARCHIVE).returncode == 0
    site.world.destroy("a")


def _loaded(site: FakeSite) -> bool:
    back = site.world.vm("a").state is State.RUNNING and _content(site) == _kept(site, "taken")
    return back and _snapshots(site) == ["s"]


def _mounted(site: FakeSite) -> None:
    """The guest uses its disk, and lets go of it when it is asked to."""
    _taken(site, mounted=["vda"])


def _interruptible(site: FakeSite) -> None:
    """A guest that worked, and whose interruption frees what is asked in the cases."""
    _taken(site)
    assert site.run("vm", "set", "a", "--interruptible").returncode == 0


def _squeezable(site: FakeSite) -> None:
    _vm(site)
    assert site.run("vm", "set", "a", "--interruptible").returncode == 0
    _keep(site, "before")


def _interrupted(site: FakeSite) -> None:
    _interruptible(site)
    done = site.run("interrupt", "a")
    assert done.returncode == 0, done.stderr
    assert _is_away(site)


def _paused(site: FakeSite) -> None:
    _squeezable(site)
    assert site.run("interrupt", "a", "--how", "pause").returncode == 0


def _squeezed(site: FakeSite) -> None:
    _squeezable(site)
    assert site.run("interrupt", "a", "--how", "squeeze").returncode == 0
    assert site.world.vm("a").allocation.memory < 256 * MIB


def _paused_and_away(site: FakeSite) -> bool:
    return site.world.vm("a").state is State.PAUSED and _is_away(site)


def _has_all_again(site: FakeSite) -> bool:
    now = site.world.vm("a").allocation
    return _came_back(site) and (now.memory, now.cpu_quota) == (256 * MIB, None)


def _is_away(site: FakeSite) -> bool:
    with open_engine(site.settings) as engine:
        return [a.vm_name for a in engine.store.pool.away(engine.facts.name)] == ["a"]


def _saved_and_away(site: FakeSite) -> bool:
    return site.world.vm("a").state is State.OFF and _is_away(site) and not _snapshots(site)


def _handed_over(site: FakeSite) -> bool:
    with open_engine(site.settings) as engine:
        found = [r for r in engine.store.pool.reservations(engine.facts.name) if r.owner == "b"]
        return [(r.state, r.granted) for r in found] == [(Held.HELD, r.size) for r in found[:1]]


def _came_back(site: FakeSite) -> bool:
    running = site.world.vm("a").state is State.RUNNING
    return running and not _is_away(site) and _content(site)["ram"] == _kept(site, "before")["ram"]


def _busy_network(site: FakeSite) -> None:
    _taken(site)
    tap = site.world.vm("a").nics[0].tap
    assert tap is not None
    site.world.queue(tap, 7)
    site.world.add_address(tap, "192.0.2.5")
    site.world.add_flow("192.0.2.5", "192.0.2.9")
    site.world.add_flow("192.0.2.7", "192.0.2.9")


def _keep(site: FakeSite, name: str) -> None:
    (site.folder / f"{name}.json").write_text(json.dumps(_content(site)))


def _kept(site: FakeSite, name: str) -> Content:
    found: Content = json.loads((site.folder / f"{name}.json").read_text())
    return found


def _snapshots(site: FakeSite) -> list[str]:
    with open_engine(site.settings) as engine:
        return [s.name for s in engine.host.machine.snapshots()]


def _hidden(site: FakeSite) -> list[str]:
    with open_engine(site.settings) as engine:
        return [s.name for s in engine.host.machine.snapshots(hidden=True) if s.hidden]


def _content(site: FakeSite) -> Content:
    return site.world.content("a")


def _names(site: FakeSite) -> set[str]:
    return {vm.name for vm in site.world.read().vms.values()}


def back(*parts: str) -> Callable[[FakeSite], bool]:
    """These parts are as in the snapshot, and the others as they were before the reset."""

    def happened(site: FakeSite) -> bool:
        taken, before = _kept(site, "taken"), _kept(site, "before")
        return _content(site) == {p: (taken if p in parts else before)[p] for p in before}

    return happened


OWNED = (0x4000000, 0xC000000)


def _range_of_ram_is_back(site: FakeSite) -> bool:
    taken, before = _kept(site, "taken"), _kept(site, "before")
    byte = site.world.vm("a").max_memory // RAM_BYTES
    first, last = (2 * at // byte for at in OWNED)
    mixed = before["ram"][:first] + taken["ram"][first:last] + before["ram"][last:]
    assert mixed not in (before["ram"], taken["ram"])
    return _content(site) == before | {"ram": mixed}


def _range_of_disk_is_back(site: FakeSite) -> bool:
    taken, before = _kept(site, "taken"), _kept(site, "before")
    mixed = before["vda"][:1] + taken["vda"][1:4] + before["vda"][4:]
    assert mixed not in (before["vda"], taken["vda"])
    return _content(site) == before | {"vda": mixed}


def _network_is_new(site: FakeSite) -> bool:
    world = site.world.read()
    assert _content(site) == _kept(site, "before")
    return world.taps[str(world.vm("a").nics[0].tap)].waiting == 0 and world.flows == [["192.0.2.7", "192.0.2.9"]]


ALLOCATE = (
    "allocate",
    "a",
    "--vcpus",
    "2",
    "--memory",
    "512MiB",
    "--iops",
    "500",
    "--net-in",
    "8Mbit",
    "--cpu-quota",
    "150%",
    "--cpu-weight",
    "50",
)
NEED = 63 << 30  # all that may be promised of a fake host
POLICY = Path(__file__).parent / "released.toml"
LOADED = ("restore_ram", "load_state", "restore_ram")
KEPT = ("prepare_snapshot", "pause", "save_state", "copy_ram")
ALIVE = ("resume", "await_life")
BOTH = ("touching", "committed")
TAKE = ("pause", "save_state", "copy_ram", "publish_snapshot", "resume")


def reset(
    name: str, options: str, steps: Sequence[str], happened: Any, prepare: Any = None, phases: Any = BOTH
) -> Case:
    argv = ("reset", "a", "--to", "s", *options.split())
    return Case("reset", argv, steps, prepare or _taken, happened, phases, f"reset-{name}")


CASES = {
    case.name or case.kind: case
    for case in (
        Case(
            "create",
            ("vm", "create", "b", "--image", "micro", "--start"),
            ("make_disks", "define", "start"),
            _image,
            lambda site: "b" in _names(site),
        ),
        Case(
            "allocate",
            ALLOCATE,
            (
                "set_cpu_quota",
                "set_disk_limit",
                "set_nic_limit",
                "set_memory",
                "set_vcpus",
                "set_cpu_weight",
                "set_record",
            ),
            _vm,
            lambda site: site.world.vm("a").allocation.vcpus == 2,
        ),
        Case(
            "start",
            ("vm", "start", "a"),
            ("start",),
            lambda site: _vm(site, False),
            lambda site: site.world.vm("a").state is State.RUNNING,
        ),
        Case(
            "stop",
            ("vm", "stop", "a"),
            ("shutdown", "clear_nics", "drop_snapshot"),
            _taken,
            lambda site: site.world.vm("a").state is State.OFF and not _snapshots(site),
        ),
        Case(
            "delete",
            ("vm", "delete", "a", "--force"),
            ("destroy", "clear_nics", "drop_snapshot", "undefine", "remove_files"),
            _taken,
            lambda site: "a" not in _names(site),
        ),
        Case(
            "protect",
            ("vm", "protect", "a"),
            ("set_record",),
            _vm,
            lambda site: bool(site.world.vm("a").record and site.world.vm("a").record.protected),
            phases=(),
        ),
        Case("set", ("vm", "set", "a", "--priority", "300"), ("set_record",), _vm,
             lambda site: bool(site.world.vm("a").record and site.world.vm("a").record.priority == 300), ()),
        Case("interrupt", ("interrupt", "a"), ("notify_guest", "save_guest", "clear_nics", "drop_snapshot"),
             _interruptible, _saved_and_away),
        Case("interrupt", ("interrupt", "a", "--how", "shutdown"),
             ("notify_guest", "end_guest", "clear_nics", "drop_snapshot"), _interruptible, _saved_and_away,
             name="interrupt-shutdown"),
        Case("interrupt", ("interrupt", "a", "--how", "power-off"),
             ("notify_guest", "destroy", "clear_nics", "drop_snapshot"), _interruptible, _saved_and_away,
             name="interrupt-power-off"),
        Case("interrupt", ("interrupt", "--need", f"memory={NEED >> 30}GiB", "--owner", "b"),
             ("notify_guest", "save_guest", "clear_nics", "drop_snapshot"), _interruptible, _handed_over,
             name="interrupt-for-need"),
        Case("interrupt", ("interrupt", "--need", f"memory={(NEED >> 20) - 100}MiB", "--owner", "b"),
             ("notify_guest", "set_memory", "set_record"), _squeezable, _handed_over, name="interrupt-squeeze"),
        Case("interrupt", ("interrupt", "a", "--how", "pause"), ("notify_guest", "suspend_guest"), _squeezable,
             _paused_and_away, name="interrupt-pause"),
        Case("resume", ("resume", "a"), ("continue_guest", "notify_guest"), _paused, _came_back, name="resume-paused"),
        Case("resume", ("resume", "a"), ("set_memory", "set_cpu_quota", "set_record", "notify_guest"), _squeezed,
             _has_all_again, name="resume-squeezed"),
        Case("resume", ("resume", "a"), ("start", "notify_guest"), _interrupted, _came_back),
        Case(
            "snapshot-take",
            ("snapshot", "take", "a", "s"),
            ("prepare_snapshot", "pause", "arm_tracker", "resume", "copy_ram", *TAKE),
            _vm,
            lambda site: _snapshots(site) == ["s"],
            BOTH,
        ),
        Case(
            "snapshot-take",
            ("snapshot", "take", "a", "t"),
            ("prepare_snapshot", "copy_ram", *TAKE),
            _taken,
            lambda site: _snapshots(site) == ["s", "t"],
            BOTH,
            "take-child",
        ),
        Case(
            "snapshot-delete",
            ("snapshot", "delete", "a", "s"),
            ("drop_snapshot",),
            _taken,
            lambda site: not _snapshots(site),
        ),
        Case(
            "snapshot-delete",
            ("snapshot", "delete", "a", "s"),
            ("drop_snapshot",),
            _with_child,
            lambda site: (_snapshots(site), _hidden(site)) == (["t"], ["s"]),
            name="delete-parent",
        ),
        Case(
            "snapshot-delete",
            ("snapshot", "delete", "a", "t"),
            ("drop_snapshot",),
            _with_hidden_parent,
            lambda site: (_snapshots(site), _hidden(site)) == ([], []),
            name="delete-child",
        ),
        Case(
            "snapshot-save",
            ("snapshot", "save", "a", "s", "--to", ARCHIVE),
            ("write_archive", "publish_archive"),
            _taken,
            lambda site: f"{ARCHIVE}/manifest.json" in site.world.read().files,
            BOTH,
        ),
        Case(
            "snapshot-load",
            ("snapshot", "load", "a", ARCHIVE),
            (
                *("drop_snapshot", "import_snapshot", "place_disks", "start", "bind_snapshot", *LOADED, "audit"),
                *("release_disks", *ALIVE, "restore_balloon", "set_record"),
            ),
            _saved,
            _loaded,
            BOTH,
        ),
        reset("whole", "", ("pause", *LOADED, "drop_queues", *ALIVE, "restore_balloon", "set_record"),
              back("ram", "devices", "vda")),
        reset("audited", "--audit",
              ("pause", *LOADED, "audit", "drop_queues", *ALIVE, "restore_balloon", "set_record"),
              back("ram", "devices", "vda")),
        reset("other-tracker", "--tracker soft-dirty",
              ("pause", "arm_tracker", *LOADED, "drop_queues", *ALIVE, "restore_balloon", "set_record"),
              back("ram", "devices", "vda"),
              lambda site: _taken(site, trackers=[TrackerKind.UFFD, TrackerKind.SOFT_DIRTY])),
        reset("without-pulse", "",
              ("pause", *LOADED, "drop_queues", "resume", "restore_balloon", "set_record", "await_agent", "set_clock",
               "reseed"),
              back("ram", "devices", "vda"), _without_pulse),
        reset("but-a-disk", "--keep disk:vda",
              ("pause", *LOADED, "drop_queues", *ALIVE, "restore_balloon", "set_record"), back("ram", "devices")),
        reset("ram-and-devices", "--only ram,devices",
              ("pause", *LOADED, "drop_queues", *ALIVE, "restore_balloon", "set_record"), back("ram", "devices")),
        reset("disk", "--only disk:vda", ("prepare_disk", "restore_disk", "ready_disk"), back("vda")),
        reset("disks", "--only disks", ("prepare_disk", "restore_disk", "ready_disk"), back("vda")),
        reset("disk-range", "--only disk:vda:0x1-0x4", ("prepare_disk", "restore_disk"), _range_of_disk_is_back),
        reset("disk-hooks", f"--only disk:data --policy {POLICY}",
              ("run_in_guest", "check_released", "prepare_disk", "restore_disk", "run_in_guest", "ready_disk"),
              back("vda"), _mounted),
        reset("replug", "--only disk:vda --replug",
              ("prepare_disk", "unplug_disk", "revert_disk", "plug_disk", "ready_disk"), back("vda"),
              lambda site: _taken(site, mounted=["vda"])),
        reset("ram-range", f"--only ram:{OWNED[0]:#x}-{OWNED[1]:#x}",
              (*KEPT, "patch_ram", "publish_snapshot", *LOADED, *ALIVE, "drop_snapshot"), _range_of_ram_is_back,
              lambda site: _taken(site, "--own", f"{OWNED[0]:#x}-{OWNED[1]:#x}")),
        reset("ram", "--only ram --accept-incoherent --audit",
              (*KEPT, "patch_ram", "publish_snapshot", *LOADED, "audit", *ALIVE, "drop_snapshot"), back("ram")),
        reset("devices", "--only devices --accept-incoherent",
              (*KEPT, "publish_snapshot", *LOADED, *ALIVE, "drop_snapshot"), back("devices")),
        reset("net-too", "--only disk:vda,net",
              ("prepare_disk", "restore_disk", "ready_disk", "drop_queues", "forget_flows", "set_nic_limit"),
              back("vda")),
        Case("reset", ("reset", "a", "--only", "net"), ("drop_queues", "forget_flows", "set_nic_limit"),
             _busy_network, _network_is_new, (), "reset-net"),
        Case("reset", ("reset", "a", "--only", "cache"), ("drop_caches",), _taken, back(), (), "reset-cache"),
    )
}  # fmt: skip
POINTS = [(name, point) for name, case in CASES.items() for point in case.points]


def recovered(site: FakeSite) -> None:
    with open_engine(site.settings) as engine:
        recover(engine)


def assert_contract(site: FakeSite) -> None:
    """What holds after any crash and its recovery (operations.md, contract 1, 3, 5 and 6)."""
    with open_engine(site.settings) as engine:
        assert engine.store.open_operations(engine.facts.name) == ()
        paused = {a.vm_uuid for a in engine.store.pool.away(engine.facts.name) if a.rung is Rung.PAUSE}
        world = site.world.read()
        shown = engine.host.machine.snapshots()
        snapshots = engine.host.machine.snapshots(hidden=True)
        assert {s.id for s in snapshots if s.hidden} <= {s.parent for s in snapshots}, "kept for nobody"
        for vm in world.vms.values():
            assert not vm.torn, "a guest ran with RAM, devices and disks of different moments"
            assert vm.state is not State.PAUSED or vm.uuid in paused
            assert free(site.settings.locks_dir, vm.uuid)
            assert set(vm.nodes) <= {s.vmstate_node for s in shown}, "leaked block nodes"
            assert not any(p.begun for p in vm.prepared.values())
            assert vm.allocation.memory == (vm.record.allocation.memory if vm.record else vm.allocation.memory)
        known = set(world.vms)
        disks = {d.path for vm in world.vms.values() for d in vm.disks}
        for path, file in world.files.items():
            own = (*(s.folder for s in snapshots), f"{ARCHIVE}/")
            assert path in disks or path.startswith(own), f"leaked {path}"
            assert set(file.tags) <= {s.tag for s in shown} or path.startswith(ARCHIVE), f"leaked tags in {path}"
        assert set(engine.host.network.owners()) <= known
        for promise in engine.store.promises(engine.facts.name):
            assert promise.vm_uuid in known
        pool = engine.store.pool.reservations(engine.facts.name)
        assert not [r for r in pool if r.state is Held.WAITING], "a demand that nobody carries on"
        assert_within_capacity(engine)


def assert_within_capacity(engine: Engine) -> None:
    """What is promised and what is reserved, now and whenever a reservation begins."""
    ledger, most = engine.store.ledger(engine.facts.name), capacity(engine)
    held = holders(ledger, observe_all(engine.host))
    kept = kept_by_others(ledger.reservations, held, frozenset(), engine.clock(), FOREVER)
    taken = sum((r for _, r in held.values()), Resources()) + kept
    assert taken.memory <= most.memory
    assert taken.cpu <= most.cpu


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FakeSite]:
    made: dict[str, FakeSite] = {}

    def site(name: str) -> FakeSite:
        if name not in made:
            made[name] = FakeSite(tmp_path_factory.mktemp(name))
            CASES[name].prepare(made[name])
        return made[name]

    return site


def copied(old: FakeSite, new: Path) -> FakeSite:
    shutil.copytree(old.folder, new)
    for manifest in (new / "images").glob("*/image.json"):
        manifest.write_text(manifest.read_text().replace(str(old.folder), str(new)))
    return replace(old, folder=new)


@pytest.fixture
def site(request: pytest.FixtureRequest, prepared: Callable[[str], FakeSite], tmp_path: Path) -> FakeSite:
    """A fresh copy of the case's prepared world; the database and the files are in the same folder."""
    return copied(prepared(request.node.callspec.params["name"]), tmp_path / "site")


@pytest.mark.parametrize("name", CASES)
def test_the_cases_name_every_step(site: FakeSite, name: str) -> None:
    """So that the matrix cannot rot: a step that an operation gained is missing here."""
    case = CASES[name]
    done = site.run("-f", "json", *case.argv)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    operation = document.get("operation") or document["interruption"]["operations"][0]
    assert [s["name"] for s in operation["steps"]] == list(case.steps)
    assert case.happened(site)
    assert_contract(site)


@pytest.mark.parametrize(("name", "point"), POINTS)
def test_killed_then_recovered_then_done_again(site: FakeSite, name: str, point: str) -> None:
    case = CASES[name]
    before = site.world.read()
    done = site.run(*case.argv, fault=f"{point}=kill")
    assert done.returncode == -9, done.stderr
    recovered(site)
    assert_contract(site)
    if not case.happened(site):
        if case.kind in ("allocate", "reset", "snapshot-take", "snapshot-delete"):
            now = site.world.read().vm("a")
            assert now.allocation == before.vm("a").allocation
            assert _content(site) == site_content(before)
        again = site.run(*case.argv)
        assert again.returncode == 0, again.stderr
    assert case.happened(site)
    assert_contract(site)


def site_content(world: Any) -> Content:
    vm = world.vm("a")
    found = {"ram": vm.ram.text, "devices": vm.devices.text}
    return found | {d.target: world.files[d.path].part.text for d in vm.disks}


DOUBLE = [
    ("allocate", "allocate:set_memory:after", "recover-allocate:set_memory:before"),
    ("allocate", "allocate:set_record:before", "recover-allocate:set_vcpus:after"),
    ("create", "create:start:after", "recover-create:destroy:after"),
    ("create", "create:define:after", "recover-create:remove_files:before"),
    ("delete", "delete:destroy:after", "recover-delete:undefine:after"),
    ("snapshot-take", "snapshot-take:copy_ram:after", "recover-snapshot-take:drop_snapshot:after"),
    ("snapshot-take", "snapshot-take:publish_snapshot:after", "recover-snapshot-take:resume:before"),
    ("snapshot-save", "snapshot-save:write_archive:after", "recover-snapshot-save:drop_archive:before"),
    ("snapshot-save", "snapshot-save:publish_archive:after", "recover-snapshot-save:close:before"),
    ("snapshot-load", "snapshot-load:place_disks:after", "recover-snapshot-load:destroy:after"),
    ("snapshot-load", "snapshot-load:load_state:after", "recover-snapshot-load:return_disks:before"),
    ("snapshot-load", "snapshot-load:load_state:after", "recover-snapshot-load:return_disks:after"),
    ("snapshot-load", "snapshot-load:committed:after", "recover-snapshot-load:release_disks:after"),
    ("snapshot-load", "snapshot-load:release_disks:after", "recover-snapshot-load:resume:after"),
    ("interrupt", "interrupt:notify_guest:after", "recover-interrupt:save_guest:after"),
    ("interrupt", "interrupt:save_guest:after", "recover-interrupt:drop_snapshot:before"),
    ("interrupt-shutdown", "interrupt:end_guest:before", "recover-interrupt:end_guest:after"),
    ("interrupt-for-need", "interrupt:save_guest:after", "recover-interrupt:close:before"),
    ("interrupt-squeeze", "interrupt:set_memory:after", "recover-interrupt:set_memory:after"),
    ("resume", "resume:start:after", "recover-resume:close:before"),
    ("resume-squeezed", "resume:set_memory:after", "recover-resume:set_cpu_quota:after"),
    ("reset-whole", "reset:restore_ram:after", "recover-reset:load_state:before"),
    ("reset-whole", "reset:load_state:before", "recover-reset:load_state:after"),
    ("reset-whole", "reset:load_state:after", "recover-reset:committed:after"),
    ("reset-whole", "reset:committed:after", "recover-reset:resume:after"),
    ("reset-whole", "reset:committed:after", "recover-reset:close:before"),
    ("reset-replug", "reset:unplug_disk:after", "recover-reset:plug_disk:before"),
    ("reset-replug", "reset:unplug_disk:after", "recover-reset:plug_disk:after"),
    ("reset-replug", "reset:revert_disk:after", "recover-reset:plug_disk:before"),
]


@pytest.mark.parametrize(("name", "first", "second"), DOUBLE)
def test_killed_again_while_recovering(site: FakeSite, name: str, first: str, second: str) -> None:
    case = CASES[name]
    assert site.run(*case.argv, fault=f"{first}=kill").returncode == -9
    assert site.run("recover", fault=f"{second}=kill").returncode == -9
    recovered(site)
    assert_contract(site)


AMID = [
    (name, point)
    for name, case in CASES.items()
    if case.kind in ("reset", "snapshot-take", "snapshot-delete")
    for point in (
        *([f"{case.kind}:touching:after"] if case.phases else []),
        *(
            f"{case.kind}:{s}:after"
            for s in case.steps
            if s in ("copy_ram", "load_state", "restore_disk", "revert_disk", "resume")
        ),
    )
]


@pytest.mark.parametrize(("name", "point"), sorted(set(AMID)))
def test_killed_again_at_every_step_of_the_recovery(site: FakeSite, tmp_path: Path, name: str, point: str) -> None:
    """What a recovery does is seen first, then it is killed at each of these steps and phases."""
    case = CASES[name]
    before = _content(site)
    assert site.run(*case.argv, fault=f"{point}=kill").returncode == -9
    quiet = copied(site, tmp_path / "quiet")
    recovered(quiet)
    with open_engine(quiet.settings) as engine:
        newest = engine.store.operations(engine.facts.name, limit=1)[0]
        steps = [s.name for s in engine.store.operation(newest.id).steps]
    phases: tuple[str, ...] = ()
    if "load_state" in steps:
        # A part is only loaded again: its scratch snapshot is whole.
        phases = BOTH[1:] if "drop_snapshot" in steps else BOTH
    counted: Counter[str] = Counter()
    places = []
    for step in [*steps, *phases, "close"]:
        counted[step] += 1
        numbered = step if counted[step] == 1 else f"{step}#{counted[step]}"
        places += [f"{numbered}:{when}" for when in ("before", "after") if (step, when) != ("close", "after")]
    for place in places:
        again = copied(site, tmp_path / place.replace(":", "-"))
        died = again.run("recover", fault=f"recover-{case.kind}:{place}=kill")
        assert died.returncode == -9, (place, died.stderr)
        recovered(again)
        assert_contract(again)
        assert case.happened(again) or _content(again) == before, place
        shutil.rmtree(again.folder)


def test_the_guests_work_after_a_finished_reset_is_not_taken_away(tmp_path: Path) -> None:
    site = FakeSite(tmp_path)
    _taken(site)
    assert site.run("reset", "a", "--to", "s", fault="reset:resume:after=kill").returncode == -9
    site.world.spoil("a", "new work")
    mine = _content(site)
    assert [o["state"] for o in site.json("recover")["operations"]] == ["done"]
    assert_contract(site)
    assert _content(site) == mine


@pytest.mark.parametrize(("point", "listed"), [("copy_ram#2:before", False), ("publish_snapshot:after", True)])
def test_a_snapshot_that_is_listed_after_a_kill_is_whole(tmp_path: Path, point: str, listed: bool) -> None:
    site = FakeSite(tmp_path)
    _vm(site)
    site.world.spoil("a", "first")
    _keep(site, "taken")
    assert site.run("snapshot", "take", "a", "s", fault=f"snapshot-take:{point}=kill").returncode == -9
    recovered(site)
    assert_contract(site)
    assert _snapshots(site) == (["s"] if listed else [])
    if listed:
        site.world.spoil("a")
        assert site.run("reset", "a", "--to", "s").returncode == 0
        assert _content(site) == _kept(site, "taken")


def test_a_guest_that_somebody_resumed_half_way_is_quarantined(tmp_path: Path) -> None:
    site = FakeSite(tmp_path)
    _taken(site)
    assert site.run("reset", "a", "--to", "s", fault="reset:load_state:before=kill").returncode == -9
    site.world.resume("a")
    done = site.json("recover")["operations"]
    assert [o["state"] for o in done] == ["quarantined"]
    refused = site.run("allocate", "a", "--vcpus", "2")
    assert refused.returncode == 5
    assert "quarantined" in refused.stderr
    assert site.run("vm", "stop", "a", "--force").returncode == 0
    assert site.run("vm", "start", "a").returncode == 0
    assert site.run("allocate", "a", "--vcpus", "2").returncode == 0


@pytest.mark.parametrize("point", ["reserved:after", "shrunk:after", "gone:before", "gone:after"])
def test_a_demand_is_carried_on_by_whoever_comes_next(tmp_path: Path, point: str) -> None:
    """Killed between its operations: nothing is open then, and what is still to be done stands in its row."""
    site = FakeSite(tmp_path)
    _interruptible(site)
    case = CASES["interrupt-for-need"]
    assert site.run(*case.argv, fault=f"demand:{point}=kill").returncode == -9
    recovered(site)
    assert case.happened(site)
    assert_contract(site)
    assert len([o for o in site.json("operation", "list")["operations"] if o["kind"] == "interrupt"]) == 1


def test_what_a_guest_said_while_nobody_waited_counts_for_whoever_recovers(tmp_path: Path) -> None:
    """Killed while it waits for the guest, which is told again of the same interruption, and has said that it is ready
    for it: an hour is not waited for."""
    site = FakeSite(tmp_path)
    _squeezable(site)
    site.world.set_behaviour("a", agent="absent")
    argv = (sys.executable, "-m", "hvctl", "interrupt", "a", "--how", "pause", "--grace", "3600")
    with subprocess.Popen(argv, env={**os.environ, **site.environment}) as waiting:
        while not site.world.vm("a").heard:
            assert waiting.poll() is None
            time.sleep(0.02)
        waiting.kill()
    site.world.say("a", f"ready {site.world.vm('a').heard[0].split()[5]}")
    (ended,) = site.json("recover")["operations"]
    assert (ended["kind"], ended["state"]) == ("interrupt", "done")
    told = [s["facts"] for s in ended["steps"] if s["name"] == "notify_guest"]
    assert told[-1] == {"told": True, "by": ["line"], "ready": True}
    assert len(set(site.world.vm("a").heard)) == 1
    assert _paused_and_away(site)
    assert_contract(site)


@pytest.mark.parametrize("point", ["row:after", "touching:after", "drop_tags:before", "drop_tags:after"])
def test_a_killed_removal_of_stray_tags_is_done_again(tmp_path: Path, point: str) -> None:
    site = FakeSite(tmp_path)
    _taken(site)
    site.world.reboot_host()
    mend = ("doctor", "--probe", "drift", "--fix")

    def tags() -> list[str]:
        vm = site.world.vm("a")
        return [t for d in vm.disks for t in site.world.read().files[str(d.path)].tags]

    assert tags() != []
    assert site.run(*mend, fault=f"snapshot-delete:{point}=kill").returncode == -9
    recovered(site)
    assert site.run(*mend).returncode == 0
    assert tags() == []
    assert_contract(site)
