"""Policies that a replay compares: TOML files; those that are shipped lie in snapshots/replay."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

from hvctl import codec
from hvctl.errors import HvctlError, NotFoundError, UsageError
from hvctl.forecasting.series import STEP
from hvctl.model.guard import Watch
from hvctl.operations import guardpolicy
from hvctl.operations.policy import folder
from hvctl.replay.policy import Amount, Policy
from hvctl.units import parse_duration

README: Final = "see snapshots/README.md"
BESIDE: Final = ("lowest-priority-first", "static")
"""Every replay shows these beside what was asked for."""
_LONGEST: Final = 7 * 86400.0
_WORDS: Final[Mapping[str, Callable[[str], float | None]]] = {
    "every": parse_duration,
    "back": parse_duration,
    "grace": parse_duration,
    "lasts": lambda text: None if text == "none" else parse_duration(text),
}


def shipped() -> dict[str, Path]:
    """By name."""
    return {path.stem: path for path in sorted((folder() / "replay").glob("*.toml"))}


def chosen(names: list[str]) -> tuple[Policy, ...]:
    """What was asked for, each once, and what always stands beside it. UsageError for two of one name, whose rows could
    not be told apart."""
    found = tuple(load(name) for name in dict.fromkeys((*names, *BESIDE)))
    known = [policy.name for policy in found]
    if twice := sorted({name for name in known if known.count(name) > 1}):
        raise UsageError(f"two policies are called {twice[0]!r}.", "rename the file")
    return found


def load(name: str) -> Policy:
    """A shipped policy by name, or one from a file; NotFoundError, UsageError."""
    path = shipped().get(name) or Path(name)
    try:
        document: dict[str, Any] = tomllib.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as e:
        known = ", ".join(shipped())
        raise NotFoundError(f"there is no replay policy {name!r}.", f"shipped: {known}; or a file") from e
    except (OSError, ValueError) as e:
        raise UsageError(f"the policy {path} cannot be read: {e}.", README) from e
    allowed = sorted({f.name for f in fields(Policy)} - {"name"})
    if unknown := sorted(set(document) - set(allowed)):
        raise UsageError(f"the policy {path} says {unknown[0]!r}, which means nothing.", f"known: {', '.join(allowed)}")
    guard = document.pop("guard", None)
    try:
        said = {key: _value(path, key, value) for key, value in document.items()}
        policy = codec.load(Policy, {"name": path.stem, **said})
    except HvctlError as e:
        raise UsageError(f"the policy {path} is not one: {e.message}", e.hint or README) from e
    if wrong := problem(policy):
        raise UsageError(f"the policy {path} does not work: {wrong}.", README)
    return replace(policy, name=path.stem, guard=None if guard is None else _guard(path, guard))


def _guard(path: Path, name: Any) -> Watch:
    """A shipped guard policy, or one from a file beside this one; NotFoundError, UsageError."""
    if not isinstance(name, str):
        raise UsageError(f"guard = {name!r} in the policy {path} names no guard policy.", 'write it as "careful"')
    file = path.parent / name
    if name not in guardpolicy.shipped() and not file.is_file():
        known = ", ".join(guardpolicy.shipped())
        raise NotFoundError(f"there is no guard policy {name!r}, which {path} names.", f"shipped: {known}; or a file")
    return replace(guardpolicy.load(name if name in guardpolicy.shipped() else str(file)), name=name)


def problem(policy: Policy) -> str | None:
    """Why it cannot be replayed."""
    if policy.allocate is Amount.NONE:
        return "it allocates nothing"
    if Amount.PERCENT in (policy.allocate, policy.reserve) and policy.percent is None:
        return "it names no percent"
    if policy.percent is not None and not 0 < policy.percent <= 100:
        return f"a percentage of {policy.percent:g} is outside 0 to 100"
    if not STEP <= policy.every <= _LONGEST or policy.every % STEP:
        return "`every` is no multiple of 5min up to 7d"
    if not STEP <= policy.back <= _LONGEST:
        return "`back` is outside 5min to 7d"
    if policy.lasts is not None and not STEP <= policy.lasts <= _LONGEST:
        return "`lasts` is outside 5min to 7d"
    if not 1 <= policy.press <= 100:
        return "`press` is outside 1 to 100"
    if not policy.rungs:
        return "it has no rungs"
    return None


def _value(path: Path, key: str, value: Any) -> Any:
    parse = _WORDS.get(key)
    if parse is None:
        return value
    if not isinstance(value, str):
        raise UsageError(f"{key} = {value!r} in the policy {path} has no unit.", 'write it as "1h"')
    return parse(value)
