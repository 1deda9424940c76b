"""kill -9 of hvctl at every fault point of every kind of operation, then recovery: the contract holds."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from faults.command import FakeSite
from hvctl.engine.lock import free
from hvctl.engine.runtime import open_engine
from hvctl.model.image import DefaultDisk, Image
from hvctl.model.vm import State

pytestmark = pytest.mark.processes

MIB = 1 << 20
ARCHIVE = "/saved-on-a-fake-host"


def engine_points(kind: str) -> list[str]:
    return [f"{kind}:{step}:after" for step in ("row", "begun", "closed")]


@dataclass(frozen=True)
class Case:
    """An operation: the world before it, the command, its steps and phases, and how its success is seen."""

    kind: str
    argv: Sequence[str]
    steps: Sequence[str]
    prepare: Callable[[FakeSite], Any]
    happened: Callable[[FakeSite], bool]
    phases: Sequence[str] = ("touching",)

    @property
    def points(self) -> list[str]:
        places = itertools.product([*self.steps, *self.phases], ("before", "after"))
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
    import json

    (folder / "image.json").write_text(json.dumps(codec.dump(image)))


def _vm(site: FakeSite, running: bool = True) -> None:
    _image(site)
    start = ("--start",) if running else ()
    done = site.run("vm", "create", "a", "--image", "micro", "--nic", "br0", *start)
    assert done.returncode == 0, done.stderr


def _taken(site: FakeSite) -> None:
    _vm(site)
    assert site.run("snapshot", "take", "a", "s").returncode == 0
    site.world.spoil("a")


def _snapshots(site: FakeSite) -> list[str]:
    with open_engine(site.settings) as engine:
        return [s.name for s in engine.host.machine.snapshots()]


def _saved(site: FakeSite) -> None:
    """A snapshot saved at once, then work, then another process, which boots from other disks."""
    _vm(site)
    assert site.run("snapshot", "take", "a", "s").returncode == 0
    assert site.run("snapshot", "save", "a", "s", "--to", ARCHIVE).returncode == 0
    site.world.spoil("a")
    site.world.destroy("a")


def _loaded(site: FakeSite) -> bool:
    return site.world.vm("a").state is State.RUNNING and _reset(site) and _snapshots(site) == ["s"]


def _content(site: FakeSite) -> dict[str, str]:
    return site.world.content("a")


def _reset(site: FakeSite) -> bool:
    return not any("spoiled" in text for text in _content(site).values() if text)


def _names(site: FakeSite) -> set[str]:
    return {vm.name for vm in site.world.read().vms.values()}


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
CASES = {
    case.kind: case
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
                "set_vcpus",
                "set_memory",
                "set_cpu_quota",
                "set_cpu_weight",
                "set_disk_limit",
                "set_nic_limit",
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
            ("shutdown", "clear_nics"),
            _vm,
            lambda site: site.world.vm("a").state is State.OFF,
        ),
        Case(
            "delete",
            ("vm", "delete", "a", "--force"),
            ("destroy", "clear_nics", "undefine", "remove_files"),
            _vm,
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
        Case(
            "snapshot-take",
            ("snapshot", "take", "a", "s"),
            ("prepare_snapshot", "pause", "save_state", "copy_ram", "publish_snapshot", "resume"),
            _vm,
            lambda site: _snapshots(site) == ["s"],
            ("touching", "committed"),
        ),
        Case(
            "snapshot-delete",
            ("snapshot", "delete", "a", "s"),
            ("drop_snapshot",),
            _taken,
            lambda site: not _snapshots(site),
        ),
        Case(
            "snapshot-save",
            ("snapshot", "save", "a", "s", "--to", ARCHIVE),
            ("write_archive", "publish_archive"),
            _taken,
            lambda site: f"{ARCHIVE}/manifest.json" in site.world.read().files,
            ("touching", "committed"),
        ),
        Case(
            "snapshot-load",
            ("snapshot", "load", "a", ARCHIVE),
            (
                *("drop_snapshot", "import_snapshot", "place_disks", "start", "bind_snapshot", "restore_ram"),
                *("load_state", "audit", "release_disks", "resume", "await_life", "restore_balloon", "set_record"),
            ),
            _saved,
            _loaded,
            ("touching", "committed"),
        ),
        Case(
            "reset",
            ("reset", "a", "--to", "s"),
            (
                "pause",
                "restore_ram",
                "load_state",
                "resume",
                "restore_balloon",
                "set_record",
                "await_agent",
                "set_clock",
                "reseed",
            ),
            _taken,
            _reset,
            ("touching", "committed"),
        ),
    )
}
POINTS = [(case.kind, point) for case in CASES.values() for point in case.points]


def recovered(site: FakeSite) -> None:
    with open_engine(site.settings) as engine:
        engine.sweep()


def assert_contract(site: FakeSite) -> None:
    """What holds after any crash and its recovery (operations.md, contract 1, 3, 5 and 6)."""
    with open_engine(site.settings) as engine:
        assert engine.store.open_operations(engine.facts.name) == ()
        world = site.world.read()
        for vm in world.vms.values():
            assert not vm.torn, "a guest ran with RAM, devices and disks of different moments"
            assert free(site.settings.locks_dir, vm.uuid)
        known = set(world.vms)
        disks = {d.path for vm in world.vms.values() for d in vm.disks}
        snapshots = {s.folder for s in engine.host.machine.snapshots()}
        for path in world.files:
            own = (*snapshots, f"{ARCHIVE}/")
            assert path in disks or any(path.startswith(folder) for folder in own), f"leaked {path}"
        assert set(engine.host.network.owners()) <= known
        for promise in engine.store.promises(engine.facts.name):
            assert promise.vm_uuid in known


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            CASES[kind].prepare(FakeSite(made[kind]))
        return made[kind]

    return folder


@pytest.fixture
def site(request: pytest.FixtureRequest, prepared: Callable[[str], Path], tmp_path: Path) -> FakeSite:
    """A fresh copy of the case's prepared world; the database and the files are in the same folder."""
    kind = request.node.callspec.params["kind"]
    shutil.copytree(prepared(kind), tmp_path / "site")
    moved = tmp_path / "site" / "images"
    for manifest in moved.glob("*/image.json"):
        manifest.write_text(manifest.read_text().replace(str(prepared(kind)), str(tmp_path / "site")))
    return FakeSite(tmp_path / "site")


@pytest.mark.parametrize("kind", CASES)
def test_the_cases_name_every_step(site: FakeSite, kind: str) -> None:
    """So that the matrix cannot rot: a step that an operation gained is missing here."""
    case = CASES[kind]
    done = site.json(*case.argv)["operation"]
    assert {s["name"] for s in done["steps"]} == set(case.steps)
    assert case.happened(site)
    assert_contract(site)


@pytest.mark.parametrize(("kind", "point"), POINTS)
def test_killed_then_recovered_then_done_again(site: FakeSite, kind: str, point: str) -> None:
    case = CASES[kind]
    before = site.world.read()
    done = site.run(*case.argv, fault=f"{point}=kill")
    assert done.returncode == -9, done.stderr
    recovered(site)
    assert_contract(site)
    if not case.happened(site):
        if kind == "allocate":
            assert site.world.vm("a").allocation == before.vm("a").allocation
        again = site.run(*case.argv)
        assert again.returncode == 0, again.stderr
    assert case.happened(site)
    assert_contract(site)


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
    ("reset", "reset:restore_ram:after", "recover-reset:load_state:before"),
    ("reset", "reset:load_state:before", "recover-reset:load_state:after"),
    ("reset", "reset:load_state:after", "recover-reset:committed:after"),
    ("reset", "reset:committed:after", "recover-reset:resume:after"),
    ("reset", "reset:committed:after", "recover-reset:close:before"),
]


@pytest.mark.parametrize(("kind", "first", "second"), DOUBLE)
def test_killed_again_while_recovering(site: FakeSite, kind: str, first: str, second: str) -> None:
    case = CASES[kind]
    assert site.run(*case.argv, fault=f"{first}=kill").returncode == -9
    assert site.run("recover", fault=f"{second}=kill").returncode == -9
    recovered(site)
    assert_contract(site)


def test_the_guests_work_after_a_finished_reset_is_not_taken_away(tmp_path: Path) -> None:
    site = FakeSite(tmp_path)
    _taken(site)
    assert site.run("reset", "a", "--to", "s", fault="reset:resume:after=kill").returncode == -9
    site.world.spoil("a", "new work")
    mine = _content(site)
    recovered(site)
    assert _content(site) == mine


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
