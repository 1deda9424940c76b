"""Policies that a replay compares: TOML files; those that are shipped lie in snapshots/replay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from hvctl.errors import NotFoundError, UsageError
from hvctl.forecasting.series import STEP
from hvctl.model.guard import Watch
from hvctl.operations import guardpolicy, policyfile
from hvctl.replay.policy import Amount, Policy
from hvctl.units import parse_duration

BESIDE: Final = ("lowest-priority-first", "static")
"""Every replay shows these beside what was asked for."""
_LONGEST: Final = 7 * 86400.0
_WORDS: Final[policyfile.Words] = {
    "every": parse_duration,
    "back": parse_duration,
    "grace": parse_duration,
    "lasts": lambda text: None if text == "none" else parse_duration(text),
}


def shipped() -> dict[str, Path]:
    return policyfile.shipped("replay")


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
    path, document = policyfile.read(name, shipped(), "replay")
    policyfile.check_keys(path, document, Policy, frozenset({"name"}))
    guard = document.pop("guard", None)
    policy = policyfile.parsed(Policy, path, {**document, "name": path.stem}, _WORDS)
    if wrong := problem(policy):
        raise UsageError(f"the policy {path} does not work: {wrong}.", policyfile.README)
    return replace(policy, guard=None if guard is None else _guard(path, guard))


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
