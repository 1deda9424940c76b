"""kill -9 of hvctl while a guard acts: whoever comes next sees what became of it, and nothing is done twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit.enginehost import MIB, add_image

from faults.command import FakeSite
from faults.test_kills import assert_contract, copied, recovered
from hvctl.engine.runtime import open_engine
from hvctl.model.guard import Decided
from hvctl.operations import guard

pytestmark = pytest.mark.processes

KEEP = 600.0
POLICY = f"""
description = "a full disk is emptied at once, and kept for a while"
to = "clean"
looks = 1
threshold = "10s"
snapshot_first = true
keep = "{KEEP:g}s"
[[allow]]
part = "disk:data"
worth = 0.0
"""
POINTS = (
    "guard:decided:after",
    "snapshot-take:publish_snapshot:after",
    "guard:kept:after",
    "reset:row:after",
    "reset:prepare_disk:after",
    "reset:restore_disk:after",
    "reset:closed:after",
    "guard:acted:after",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> FakeSite:
    """A guarded VM whose disk has filled up since its snapshot."""
    folder = tmp_path_factory.mktemp("guard")
    made = FakeSite(folder / "site")
    made.folder.mkdir()
    add_image(made)
    (folder / "policy.toml").write_text(POLICY)
    for argv in (
        ("vm", "create", "a", "--image", "micro", "--start"),
        ("snapshot", "take", "a", "clean"),
        ("guard", "a", "--policy", str(folder / "policy.toml")),
    ):
        done = made.run(*argv)
        assert done.returncode == 0, done.stderr
    with made.world._file.change() as world:
        file = world.files[str(world.vm("a").disks[0].path)]
        file.part.size, file.most = 64 * MIB, 64 * MIB
    return made


@pytest.fixture
def site(prepared: FakeSite, tmp_path: Path) -> FakeSite:
    return copied(prepared, tmp_path / "site")


def decisions(site: FakeSite) -> list[Decided]:
    """Of those that do something, the newest first."""
    with open_engine(site.settings) as engine:
        uuid = engine.host.domains.uuid("a")
        return [d for d in engine.store.guards.of_vm(engine.facts.name, uuid) if d.decision.chosen is not None]


def full(site: FakeSite) -> bool:
    world = site.world.read()
    return world.files[str(world.vm("a").disks[0].path)].part.size == 64 * MIB


@pytest.mark.parametrize("point", POINTS)
def test_killed_while_it_acts(site: FakeSite, point: str) -> None:
    assert site.run("job", "run", "guard", fault=f"{point}=kill").returncode == -9
    recovered(site)
    assert_contract(site)
    was_full = full(site)
    next_one = site.run("job", "run", "guard")
    assert next_one.returncode == 0, next_one.stderr
    (one,) = decisions(site)
    assert one.outcome is not None, "what became of it is seen"
    assert one.outcome.startswith("done") != was_full, one.outcome
    assert full(site) == was_full, "it cools down, whether its action was done or not"
    resets = [o for o in site.json("operation", "list")["operations"] if o["kind"] == "reset"]
    assert len(resets) <= 1
    assert_contract(site)
    with open_engine(site.settings) as engine:
        engine.clock = lambda: one.at + KEEP + 1.0
        guard.cycle(engine)
        assert one.kept not in [s.name for s in engine.host.machine.snapshots()], "what was kept goes in its time"
    assert_contract(site)
    assert not full(site), "and after the cool-down it is tried again"
