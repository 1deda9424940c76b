"""Rules of the repository itself that no linter checks."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Tests look at hvctl through qemu-img too; in the product one module calls it, and one knows its package.
QEMU_IMG = {"hvctl/adapters/qemu/qemuimg.py", "hvctl/adapters/tools.py"}
LINES = 400
MACHINE = re.compile(r"(?<![\w./-])/(work|root|tmp)(?=[/\"'\s`]|$)")
REGISTRY = re.compile(r"https?://[^\s\"'<>)]*(pypi|pythonhosted|proxy|mirror|registry|npmjs|crates\.io|debian\.org)")


def tracked() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def texts() -> dict[str, str]:
    found = {}
    for path in tracked():
        try:
            found[path.relative_to(ROOT).as_posix()] = path.read_text()
        except UnicodeDecodeError:
            continue
    return found


def modules() -> dict[str, str]:
    return {name: text for name, text in texts().items() if name.endswith(".py")}


def test_every_module_says_what_it_is_for() -> None:
    empty = {name for name, text in modules().items() if not text.strip()}
    assert {n for n, t in modules().items() if not ast.get_docstring(ast.parse(t))} <= {
        n for n in empty if n.endswith("__init__.py")
    }


def test_modules_stay_small() -> None:
    sizes = {n: t.count("\n") for n, t in modules().items() if n.startswith(("hvctl/", "bench/"))}
    assert not {name: size for name, size in sizes.items() if size > LINES}


def test_one_module_knows_qemu_img() -> None:
    """A string that names it anywhere else is a call on the way past its wrapper; prose in docstrings is none."""
    found = set()
    for name, text in modules().items():
        if not name.startswith("hvctl/"):
            continue
        tree = ast.parse(text)
        prose = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
        for node in ast.walk(tree):
            text_of_code = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
            if text_of_code and "qemu-img" in node.value:
                found.add(name)
    assert found == QEMU_IMG


def test_one_module_moves_memory_of_processes() -> None:
    found = {name for name, text in modules().items() if name.startswith("hvctl/") and "process_vm_" in text}
    assert found == {"hvctl/adapters/kernel/processmemory.py"}


ONCE = """
import pathlib, pytest
@pytest.mark.host
def test_once():
    seen = pathlib.Path("seen")
    if not seen.exists():
        seen.touch()
        raise AssertionError("because of this")
"""


def test_what_passes_at_the_second_try_is_told_with_its_first_failure(tmp_path: Path) -> None:
    """As `make test` has it of tests on real guests."""
    (line,) = (x for x in (ROOT / "Makefile").read_text().splitlines() if "--reruns" in x)
    _, *options = shlex.split(line)
    tmp_path.joinpath("test_rerun.py").write_text(ONCE)
    argv = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "1 passed, " in done.stdout
    _, told = done.stdout.split("rerun test summary info")
    assert "RERUN test_rerun.py::test_once" in told
    assert "AssertionError: because of this" in told


def test_no_address_of_a_registry_and_no_path_of_one_machine() -> None:
    for name, text in texts().items():
        if name == Path(__file__).relative_to(ROOT).as_posix():
            continue
        assert not REGISTRY.search(text), name
        assert not MACHINE.search(text), f"{name}: {MACHINE.search(text)}"


def test_nothing_is_fetched_without_encryption() -> None:
    """The only addresses in the product are names of XML vocabularies."""
    for name, text in modules().items():
        if name.startswith("hvctl/"):
            assert set(re.findall(r"http://[^\s\"']+", text)) <= {"http://libvirt.org/schemas/domain/qemu/1.0"}, name
