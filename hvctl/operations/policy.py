"""Reset policies: TOML files that say which parts go back, what is kept, how often is audited, and which programs the
guest runs for it. The shipped ones lie in snapshots/."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hvctl.decide.scope import parse_scope
from hvctl.errors import UsageError
from hvctl.model.reset import AS_USUAL, Hooks, Scope, Wishes
from hvctl.model.tracker import TrackerKind
from hvctl.operations import policyfile


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
    replug: bool = False
    before: tuple[tuple[str, ...], ...] = ()
    after: tuple[tuple[str, ...], ...] = ()


def shipped() -> dict[str, Path]:
    """The policies of this installation by name."""
    return policyfile.shipped()


def load(name: str) -> Policy:
    """A shipped policy by name, or one from a file; NotFoundError, UsageError."""
    path, document = policyfile.read(name, shipped(), "reset")
    policyfile.check_keys(path, document, Policy)
    said = policyfile.parsed(Policy, path, document)
    if not all(argv and argv[0] for argv in (*said.before, *said.after)):
        raise UsageError(f"the policy {path} names no program in one of its hooks.", policyfile.README)
    return said


def merged(
    policy: str | None,
    only: Sequence[str],
    keep: Sequence[str],
    tracker: TrackerKind,
    audit: bool | None,
    accept_incoherent: bool,
    replug: bool = False,
) -> tuple[Scope, Wishes]:
    """What a command asks for; its own options are stronger than the policy's."""
    if policy is None:
        wishes = replace(AS_USUAL, tracker=tracker, audit=audit, accept_incoherent=accept_incoherent, replug=replug)
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
        replug=said.replug or replug,
    )
