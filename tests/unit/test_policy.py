"""Reset policies: files that say what they mean, and nothing that they do not."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from hvctl.errors import NotFoundError, UsageError
from hvctl.model.reset import WHOLE, Hooks, Scope
from hvctl.model.tracker import TrackerKind
from hvctl.operations import policy
from hvctl.operations.policy import Policy, load, merged, shipped

README = Path(__file__).parents[2] / "snapshots" / "README.md"


def file(folder: Path, text: str) -> str:
    path = folder / "policy.toml"
    path.write_text(text)
    return str(path)


def asked(name: str | None, only: tuple[str, ...] = (), keep: tuple[str, ...] = ()) -> tuple[Scope, object]:
    return merged(name, only, keep, TrackerKind.AUTO, None, False)


def test_what_is_shipped() -> None:
    assert list(shipped()) == ["ci-runner", "fuzzing", "sandbox"]


@pytest.mark.parametrize("name", shipped())
def test_each_shipped_policy_is_whole_and_explained(name: str) -> None:
    found = load(name)
    assert len(found.description) > 20
    scope, wishes = asked(name)
    assert scope.needs_snapshot
    assert not wishes.accept_incoherent  # type: ignore[attr-defined]
    assert f"**{name}**" in README.read_text()


def test_what_the_shipped_ones_do() -> None:
    assert asked("ci-runner")[0] == Scope(keep=("results",))
    sandbox, wishes = asked("sandbox")
    assert sandbox == Scope(True, True, None, net=True)
    assert wishes.audit is True  # type: ignore[attr-defined]
    whole, quick = asked("fuzzing")
    assert whole == WHOLE
    assert (quick.clock, quick.reseed, quick.audit) == (False, False, None)  # type: ignore[attr-defined]


def test_every_key_stands_in_the_readme() -> None:
    text = README.read_text()
    assert not {f.name for f in fields(Policy)} - set(text.replace("`", " ").replace(",", " ").split())


def test_a_file_that_says_everything(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        'description = "all"\nonly = ["disk:vdb"]\ntracker = "compare"\naudit = false\naccept_incoherent = true\n'
        'clock = false\nreseed = false\nbefore = [["umount", "/data"], ["sync"]]\nafter = [["mount", "/data"]]\n',
    )
    scope, wishes = asked(path)
    assert scope.disks is not None
    assert [d.disk for d in scope.disks] == ["vdb"]
    assert wishes == policy.Wishes(
        TrackerKind.COMPARE, False, True, False, False, Hooks((("umount", "/data"), ("sync",)), (("mount", "/data"),))
    )


def test_what_the_command_says_is_stronger(tmp_path: Path) -> None:
    path = file(tmp_path, 'description = "x"\nkeep = ["disk:a"]\ntracker = "uffd"\naudit = true\n')
    scope, wishes = merged(path, ["ram,devices"], [], TrackerKind.COMPARE, False, True)
    assert scope == Scope(True, True, ())
    assert (wishes.tracker, wishes.audit, wishes.accept_incoherent) == (TrackerKind.COMPARE, False, True)
    assert merged(path, [], ["disk:b"], TrackerKind.AUTO, None, False)[0] == Scope(keep=("b",))
    kept, wishes = asked(path)
    assert kept == Scope(keep=("a",))
    assert (wishes.tracker, wishes.audit) == (TrackerKind.UFFD, True)  # type: ignore[attr-defined]


def test_without_a_policy_the_options_are_all() -> None:
    scope, wishes = merged(None, ["net"], [], TrackerKind.UFFD, True, True)
    assert scope == Scope(False, False, (), net=True)
    assert (wishes.tracker, wishes.audit, wishes.accept_incoherent) == (TrackerKind.UFFD, True, True)
    assert wishes.hooks == Hooks()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not one"),
        ('description = "x"\nonyl = ["ram"]', "'onyl', which means nothing"),
        ('description = "x"\n[only]\nram = true', "not one"),
        ('description = 5', "not one"),
        ('description = "x"\nonly = "ram"', "not one"),
        ('description = "x"\nonly = [["ram"]]', "not one"),
        ('description = "x"\nkeep = [5]', "not one"),
        ('description = "x"\naudit = "always"', "not one"),
        ('description = "x"\nclock = 7', "not one"),
        ('description = "x"\ntracker = "magic"', "not one"),
        ('description = "x"\nbefore = ["umount"]', "not one"),
        ('description = "x"\nbefore = [[]]', "no program"),
        ('description = "x"\nafter = [["mount"], []]', "no program"),
        ('description = "x"\nafter = [[""]]', "no program"),
        ('description = "x', "cannot be read"),
        ("\x00", "cannot be read"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_policy_is_refused_in_a_sentence(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        load(file(tmp_path, text))
    assert said in refused.value.message
    assert "policy.toml" in refused.value.message


def test_parts_that_mean_nothing_are_refused_like_those_of_the_command(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a part"):
        asked(file(tmp_path, 'description = "x"\nonly = ["everything"]'))
    with pytest.raises(UsageError, match="one of them"):
        asked(file(tmp_path, 'description = "x"\nonly = ["ram"]\nkeep = ["disk:a"]'))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_bytes(b"description = '\xff'")
    with pytest.raises(UsageError, match="cannot be read"):
        load(str(tmp_path / "policy.toml"))


def test_one_that_is_not_there_names_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as missing:
        load("nobody")
    assert missing.value.hint is not None
    assert "ci-runner, fuzzing, sandbox" in missing.value.hint
    with pytest.raises(UsageError, match="cannot be read"):
        load(str(tmp_path))
