"""The README's commands exist, with the options it shows."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from hvctl.cli.app import app

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line.partition("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.startswith("hvctl ")]


def test_the_readme_shows_commands() -> None:
    assert len(LINES) > 12


@pytest.mark.parametrize("line", LINES)
def test_a_command_of_the_readme_is_one(line: str) -> None:
    command = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    assert not hasattr(command, "commands"), f"{line} names no command"
    known = {option for parameter in command.params for option in parameter.opts}
    shown = words[: words.index("--")] if "--" in words else words
    assert {w.partition("=")[0] for w in shown if w.startswith("-")} <= known


def test_every_exit_status_is_in_the_readme() -> None:
    from hvctl.errors import Exit

    rows = {int(n) for n in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    assert rows == set(Exit)
