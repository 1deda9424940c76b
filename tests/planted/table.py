"""The table of planted bugs, and what is wrong with it: a text that stands no more, or a test that is not there."""

from __future__ import annotations

import ast
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("bugs.toml")
NEEDED = ("name", "effect", "file", "old", "tests")


@dataclass(frozen=True, slots=True)
class Bug:
    """`old` stands exactly once in `file`, and `new` takes its place; then each of `tests` (pytest's node ids, without
    parameters those of all) must fail. host: they need libvirtd, QEMU and the guest images."""

    name: str
    effect: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    host: bool = False

    def planted(self, text: str) -> str:
        return text.replace(self.old, self.new)


def bugs(table: Path = TABLE) -> list[Bug]:
    """ValueError names an entry that is not whole."""
    found = [_bug(entry) for entry in tomllib.loads(table.read_text())["bug"]]
    twice = {b.name for b in found if sum(b.name == other.name for other in found) > 1}
    if twice:
        raise ValueError(f"two planted bugs have the same name: {', '.join(sorted(twice))}")
    return found


def _bug(entry: dict[str, Any]) -> Bug:
    unknown = set(entry) - {*NEEDED, "new", "host"}
    empty = [key for key in NEEDED if not entry.get(key)]
    if unknown or empty or "new" not in entry:
        raise ValueError(f"planted bug {entry.get('name')!r}: unknown {sorted(unknown)}, missing {empty}")
    return Bug(**{**entry, "tests": tuple(entry["tests"])})


def problem(root: Path, bug: Bug) -> str | None:
    """In words, why this entry cannot be planted in the checkout `root` any more; None if it can."""
    try:
        text = (root / bug.file).read_text()
    except OSError as e:
        return f"{bug.file}: {e.strerror}"
    if (count := text.count(bug.old)) != 1:
        return f"its text stands {count} times in {bug.file}, not once"
    try:
        if ast.dump(ast.parse(bug.planted(text))) == ast.dump(ast.parse(text)):
            return "what is planted means the same as before"
    except SyntaxError as e:
        return f"what is planted is no Python: {e}"
    missing = [test for test in bug.tests if not _is_there(root, test)]
    return f"there is no test {', '.join(missing)}" if missing else None


def _is_there(root: Path, test: str) -> bool:
    file, _, name = test.partition("::")
    try:
        tree = ast.parse((root / file).read_text())
    except OSError:
        return False
    return name.partition("[")[0] in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
