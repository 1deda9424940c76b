"""hvctl guard and hvctl explain as people and programs read them."""

from __future__ import annotations

import json

import pytest
from faults.command import FakeSite

from hvctl.engine.runtime import open_engine
from hvctl.errors import Exit
from hvctl.operations.guard import cycle
from unit.commandline import Run, runner
from unit.enginehost import add_image
from unit.test_cli import golden


@pytest.fixture
def run(site: FakeSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    add_image(site)
    made = runner(site, monkeypatch, capsys)
    assert made("vm", "create", "a", "--image", "micro", "--start").status == 0
    assert made("snapshot", "take", "a", "clean").status == 0
    return made


def looked(site: FakeSite) -> None:
    with open_engine(site.settings) as engine:
        engine.clock = lambda: 1_800_000_000.0
        cycle(engine)


@pytest.mark.parametrize("form", ["table", "json"])
def test_what_is_printed(run: Run, site: FakeSite, form: str) -> None:
    told = run("-f", form, "guard", "a", "--policy", "careful", "--dry-run")
    armed = run("-f", form, "guard", "a", "--policy", "careful")
    looked(site)
    status = run("-f", form, "guard", "status")
    decision, operation = run("-f", form, "explain", "d1"), run("-f", form, "explain", "3")
    assert [r.status for r in (told, armed, status, decision, operation)] == [0] * 5
    # The document of an operation has the paths of this very test.
    golden(f"cli-guard-{form}", armed.out + status.out + decision.out + (operation.out if form == "table" else ""))
    same = told.out.replace("\n", " ") if form == "table" else json.loads(told.out)["decision"]["decision"]["verdict"]
    assert "nothing runs out" in same


def test_off_undo_and_what_makes_no_sense(run: Run, site: FakeSite) -> None:
    assert run("guard", "a", "--policy", "careful").status == 0
    assert "nothing to do" in run("guard", "a", "--policy", "careful").out
    assert run("guard", "a", "--off", "--dry-run").status == 0
    assert "careful" in run("guard", "status").out
    undone = run("guard", "a", "--undo")
    assert (undone.status, "snapshot_first" in undone.err) == (Exit.REFUSED, True)
    assert run("guard", "a", "--off").status == 0
    assert "careful" not in run("guard", "status").out
    for argv in (("guard", "a"), ("guard", "a", "--off", "--undo"), ("guard", "status", "--off")):
        assert run(*argv).status == Exit.USAGE
    assert run("guard", "b", "--policy", "careful").status == Exit.NOT_FOUND
    assert run("guard", "a", "--policy", "nobody").status == Exit.NOT_FOUND


def test_a_pause_is_said(run: Run) -> None:
    run("guard", "a", "--policy", "careful")
    run("job", "pause", "guard")
    assert "paused by operator: hvctl job resume guard" in run("guard", "status").err


def test_what_the_metadata_lost_is_guarded_still_until_it_is_off(run: Run, site: FakeSite) -> None:
    """An older hvctl, or another's edit, may write the record without it."""
    run("guard", "a", "--policy", "careful")
    with site.world._file.change() as world:
        record = world.vm("a").record
        assert record is not None
        world.vm("a").record = type(record)(record.allocation, record.image)
    assert "careful" in run("guard", "status").out
    assert run("guard", "a", "--off").status == 0
    assert "careful" not in run("guard", "status").out
