"""Files of policies: TOML, shipped by name or from a file of the user's, in which every key means something."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, Final, TypeVar

from hvctl import codec
from hvctl.errors import HvctlError, NotFoundError, UsageError

README: Final = "see snapshots/README.md"
T = TypeVar("T")
Words = Mapping[str, Callable[[str], Any]]
"""Keys whose values have a unit, so that nobody has to know which."""


def shipped(kind: str = "") -> dict[str, Path]:
    """The policies of this installation by name; kind: the folder below."""
    packaged = resources.files("hvctl") / "_snapshots"
    folder = Path(str(packaged)) if packaged.is_dir() else Path(__file__).parents[2] / "snapshots"
    return {path.stem: path for path in sorted((folder / kind).glob("*.toml"))}


def read(name: str, known: Mapping[str, Path], what: str) -> tuple[Path, dict[str, Any]]:
    """A shipped policy by name, or one from a file. what: reset, guard or replay; NotFoundError, UsageError."""
    path = known.get(name) or Path(name)
    try:
        return path, tomllib.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as e:
        raise NotFoundError(f"there is no {what} policy {name!r}.", f"shipped: {', '.join(known)}; or a file") from e
    except (OSError, ValueError) as e:
        raise UsageError(f"the policy {path} cannot be read: {e}.", README) from e


def check_keys(path: Path, document: Mapping[str, Any], kind: type, besides: frozenset[str] = frozenset()) -> None:
    """UsageError for a key that is no field of it; besides: fields that no file may say."""
    known = {f.name for f in fields(kind)} - besides
    if unknown := sorted(set(document) - known):
        raise UsageError(
            f"the policy {path} says {unknown[0]!r}, which means nothing.", f"known: {', '.join(sorted(known))}"
        )


def parsed(kind: type[T], path: Path, document: Mapping[str, Any], words: Words | None = None) -> T:
    """UsageError for what is no such policy."""
    try:
        return codec.load(kind, {key: _value(key, value, words or {}) for key, value in document.items()})
    except HvctlError as e:
        raise UsageError(f"the policy {path} is not one: {e.message}", e.hint or README) from e


def _value(key: str, value: Any, words: Words) -> Any:
    parse = words.get(key)
    if parse is None:
        return value
    if not isinstance(value, str):
        raise UsageError(f"{key} = {value!r} has no unit.", 'write it as "1h", "50%" or "1GiB"')
    return parse(value)
