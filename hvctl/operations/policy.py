"""Reset policies: TOML files that say which parts go back, what is kept, how often is audited, and which programs the
guest runs for it. The shipped ones lie in snapshots/."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from hvctl import codec
from hvctl.decide.scope import parse_scope
from hvctl.errors import HvctlError, NotFoundError, UsageError
from hvctl.model.reset import AS_USUAL, Hooks, Scope, Wishes
from hvctl.model.tracker import TrackerKind


@dataclass(frozen=True, slots=True)
class Policy:
    """What a file may say. only and keep are as the options of `hvctl reset`; audit is always, never or as the settings
    say; before and after are argument lists for the guest."""

    description: str
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    tracker: TrackerKind = TrackerKind.AUTO
    audit: bool | None = None
    accept_incoherent: bool = False
    clock: bool = True
    reseed: bool = True
    before: tuple[tuple[str, ...], ...] = ()
    after: tuple[tuple[str, ...], ...] = ()


def folder() -> Path:
    """Where this installation has its policies."""
    packaged = resources.files("hvctl") / "_snapshots"
    return Path(str(packaged)) if packaged.is_dir() else Path(__file__).parents[2] / "snapshots"


def shipped() -> dict[str, Path]:
    """The policies of this installation by name."""
    return {path.stem: path for path in sorted(folder().glob("*.toml"))}


def load(name: str) -> Policy:
    """A shipped policy by name, or one from a file; NotFoundError, UsageError."""
    path = shipped().get(name) or Path(name)
    try:
        document: dict[str, Any] = tomllib.loads(path.read_text())
    except FileNotFoundError as e:
        raise NotFoundError(f"there is no reset policy {name!r}.", f"shipped: {', '.join(shipped())}; or a file") from e
    except (OSError, ValueError) as e:
        raise UsageError(f"the policy {path} cannot be read: {e}.") from e
    unknown = sorted(set(document) - set(Policy.__dataclass_fields__))
    if unknown:
        raise UsageError(f"the policy {path} says {unknown[0]!r}, which means nothing.", "see snapshots/README.md")
    try:
        said = codec.load(Policy, document)
    except HvctlError as e:
        raise UsageError(f"the policy {path} is not one: {e.message}", "see snapshots/README.md") from e
    if not all(argv and argv[0] for argv in (*said.before, *said.after)):
        raise UsageError(f"the policy {path} names no program in one of its hooks.", "see snapshots/README.md")
    return said


def merged(
    policy: str | None,
    only: Sequence[str],
    keep: Sequence[str],
    tracker: TrackerKind,
    audit: bool | None,
    accept_incoherent: bool,
) -> tuple[Scope, Wishes]:
    """What a command asks for; its own options are stronger than the policy's."""
    if policy is None:
        wishes = replace(AS_USUAL, tracker=tracker, audit=audit, accept_incoherent=accept_incoherent)
        return parse_scope(only, keep), wishes
    said = load(policy)
    scope = parse_scope(only, keep) if only or keep else parse_scope(said.only, said.keep)
    return scope, Wishes(
        tracker=said.tracker if tracker is TrackerKind.AUTO else tracker,
        audit=said.audit if audit is None else audit,
        accept_incoherent=said.accept_incoherent or accept_incoherent,
        clock=said.clock,
        reseed=said.reseed,
        hooks=Hooks(said.before, said.after),
    )
