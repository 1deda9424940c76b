"""Every option of every command is said in its help and exercised by some test; help and completion stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer.main

from hvctl.cli.app import app

TESTS = Path(__file__).parent.parent
HEAVY = (
    "sqlmodel",
    "sqlalchemy",
    "libvirt",
    "pyroute2",
    "lxml",
    "numpy",
    "pydantic",
    "qemu",
    "alembic",
    "yaml",
    "lightgbm",
    "pyarrow",
    "scipy",
    "matplotlib",
    "apscheduler",
)
# What the framework itself brings, and is tested by its makers.
FRAMEWORKS = {"--help", "--install-completion", "--show-completion"}


def commands(command: click.Command, name: str = "hvctl") -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if hasattr(command, "commands"):
        for word, inner in command.commands.items():
            yield from commands(inner, f"{name} {word}")


COMMANDS = dict(commands(typer.main.get_command(app)))


def options(command: click.Command) -> set[str]:
    longs = {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")}
    return longs - FRAMEWORKS


def lines_of_tests() -> Iterator[set[str]]:
    """The words that stand together in one list, tuple or call of a test, with those of lists inside of it."""
    for path in TESTS.rglob("*.py"):
        if path == Path(__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.List | ast.Tuple | ast.Call | ast.Assign):
                found = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
                if any(word.startswith("-") for word in found):
                    yield found


LINES = list(lines_of_tests())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_exercised(name: str) -> None:
    """Together with the words of its command, in one test."""
    words = set(name.split()[1:])
    near = [line for line in LINES if words <= line]
    missing = {o for o in options(COMMANDS[name]) if not any(o in line for line in near)}
    assert not missing, f"no test runs {name} with {sorted(missing)}"


def test_helps_list_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in COMMANDS.items():
        context = click.Context(command, info_name=name, terminal_width=200)
        text = command.get_help(context)
        missing = {o for o in options(command) if o not in text}
        assert not missing, f"{name} --help does not say {sorted(missing)}"
        assert command.help, name
        assert all(getattr(p, "help", "") for p in command.params if isinstance(p, click.Option)), name


CHILD = """
import sys
sys.argv = ["hvctl", *sys.argv[1:]]
from hvctl.__main__ import main
try:
    main()
finally:
    print("loaded:", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def loaded(*argv: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", CHILD, *argv], capture_output=True, text=True, check=True)
    assert done.stdout
    found = set(done.stderr.partition("loaded:")[2].split())
    assert {"hvctl", "typer"} <= found
    return found & set(HEAVY)


@pytest.mark.parametrize("flag", ["--help", "-h", "--version"])
def test_help_loads_nothing_heavy(flag: str) -> None:
    assert not loaded(flag)


@pytest.mark.parametrize("words", [("vm", "create"), ("allocate",), ("node", "run"), ("config", "show")])
def test_the_help_of_a_command_loads_only_what_typer_loads(words: tuple[str, ...]) -> None:
    """Newer versions of typer read the parameters of a command with pydantic."""
    assert loaded(*words, "--help") <= {"pydantic"}


def test_a_look_brings_no_arrays_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVCTL_STATE_DIR", str(tmp_path))
    assert not loaded("-c", f"fake://{tmp_path}/host.json", "-f", "json", "vm", "list") & {"numpy", "pyroute2"}
