"""Guard policies: TOML files that say what a guard may do for a VM, and when. Those that are shipped lie in
snapshots/guard."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from hvctl import codec
from hvctl.decide.guardpolicy import problem
from hvctl.errors import HvctlError, NotFoundError, UsageError
from hvctl.model.guard import Allowed, GuardPolicy, Watch
from hvctl.operations.policy import folder
from hvctl.units import parse_duration, parse_percent, parse_size

README = "see snapshots/README.md"
_WORDS: Mapping[str, Callable[[str], Any]] = {
    **dict.fromkeys(("threshold", "horizon", "window", "cool_down", "keep"), parse_duration),
    **dict.fromkeys(("release", "grow_by", "disk_full"), lambda text: parse_percent(text) / 100),
    "resident": parse_size,
}
"""Keys whose values have a unit, so that nobody has to know which."""


def shipped() -> dict[str, Path]:
    """The guard policies of this installation by name."""
    return {path.stem: path for path in sorted((folder() / "guard").glob("*.toml"))}


def load(name: str) -> Watch:
    """A shipped policy by name, or one from a file; NotFoundError, UsageError."""
    path = shipped().get(name) or Path(name)
    try:
        document: dict[str, Any] = tomllib.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as e:
        raise NotFoundError(f"there is no guard policy {name!r}.", f"shipped: {', '.join(shipped())}; or a file") from e
    except (OSError, ValueError) as e:
        raise UsageError(f"the policy {path} cannot be read: {e}.") from e
    _check_keys(path, document, GuardPolicy)
    allow = document.get("allow")
    for one in allow if isinstance(allow, list) else ():
        _check_keys(path, one if isinstance(one, dict) else {}, Allowed)
    try:
        policy = codec.load(GuardPolicy, {key: _value(path, key, value) for key, value in document.items()})
    except HvctlError as e:
        raise UsageError(f"the policy {path} is not one: {e.message}", e.hint or README) from e
    if wrong := problem(policy):
        raise UsageError(f"the policy {path} does not work: {wrong}.", README)
    return Watch(name, policy)


def _check_keys(path: Path, document: Mapping[str, Any], kind: type) -> None:
    known = {f.name for f in fields(kind)}
    if unknown := sorted(set(document) - known):
        raise UsageError(
            f"the policy {path} says {unknown[0]!r}, which means nothing.", f"known: {', '.join(sorted(known))}"
        )


def _value(path: Path, key: str, value: Any) -> Any:
    parse = _WORDS.get(key)
    if parse is None:
        return value
    if not isinstance(value, str):
        raise UsageError(f"{key} = {value!r} in the policy {path} has no unit.", README)
    return parse(value)
