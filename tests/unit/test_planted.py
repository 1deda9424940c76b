"""The table of planted bugs fits what is here now; that the tests notice them is seen by `make planted`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.planted.checkout import Checkout, Ran
from tests.planted.table import Bug, bugs, problem

ROOT = Path(__file__).parents[2]
TABLE = bugs()


@pytest.mark.parametrize("bug", TABLE, ids=lambda b: b.name)
def test_it_can_be_planted_and_its_tests_are_there(bug: Bug) -> None:
    assert problem(ROOT, bug) is None


def test_an_entry_that_does_not_fit_any_more_is_found() -> None:
    bug = TABLE[0]
    assert "0 times" in str(problem(ROOT, replace(bug, old="a text that stands nowhere in it")))
    assert "not once" in str(problem(ROOT, replace(bug, old="import")))
    assert "the same" in str(problem(ROOT, replace(bug, new=f"{bug.old}  # a remark\n")))
    assert "no Python" in str(problem(ROOT, replace(bug, new="(")))
    assert "there is no test" in str(problem(ROOT, replace(bug, tests=(f"{bug.tests[0]}_not",))))
    assert "hvctl/none.py" in str(problem(ROOT, replace(bug, file="hvctl/none.py")))


def test_a_table_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "bugs.toml"
    entry = '[[bug]]\nname = "a"\neffect = "e"\nfile = "f"\nold = "o"\nnew = ""\ntests = ["t"]\n'
    table.write_text(entry)
    assert [b.name for b in bugs(table)] == ["a"]
    for wrong, why in ((entry + entry, "the same name"), (entry.replace("effect", "affect"), "affect")):
        table.write_text(wrong)
        with pytest.raises(ValueError, match=why):
            bugs(table)


@pytest.mark.processes
def test_only_a_test_that_failed_has_noticed(tmp_path: Path) -> None:
    """Not one that could not be imported, was skipped, or is not there."""
    (tmp_path / "part.py").write_text("NUMBER = 1\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest\nfrom part import NUMBER\n\n"
        "@pytest.mark.parametrize('n', [1, 2])\ndef test_it(n): assert NUMBER != 2 or n != 2\n\n"
        "def test_it_too(): pass\n\ndef test_later(): pytest.skip('not here') if NUMBER == 3 else None\n"
    )
    bug = replace(TABLE[0], file="part.py", old="1", new="2", tests=("test_it.py::test_it", "test_it.py::test_it_too"))
    checkout = Checkout(tmp_path)
    assert checkout.run(bug.tests, host=False) == Ran(frozenset())
    with checkout.planted(bug):
        assert checkout.run(bug.tests, host=False) == Ran(frozenset({"test_it.py::test_it"}))
    with checkout.planted(replace(bug, new="1 / 0")):
        broken = checkout.run(bug.tests, host=False)
    assert (broken.failed, "pytest ended with status" in broken.trouble) == (frozenset(), True)
    with checkout.planted(replace(bug, new="3")):
        skipped = checkout.run(["test_it.py::test_later"], host=False)
    assert (skipped.failed, "not here" in skipped.trouble) == (frozenset(), True)
    assert (tmp_path / "part.py").read_text() == "NUMBER = 1\n"
