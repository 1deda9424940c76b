"""The table of planted bugs fits what is here now; that the tests notice them is seen by `make planted`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from planted.table import Bug, bugs, problem

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
