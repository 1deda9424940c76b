"""What a probe of the host found: a fact with its consequence and its cure, for `hvctl doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Health(StrEnum):
    """ok: works. degraded: hvctl works with less. failing: something hvctl needs does not work."""

    OK = "ok"
    DEGRADED = "degraded"
    FAILING = "failing"


@dataclass(frozen=True, slots=True)
class Finding:
    """detail is what was seen; lost is what does not work and remedy the command that mends it, both None when ok.

    fixable tells that hvctl itself can mend it (`hvctl host prepare --yes` or `hvctl doctor --fix`).
    """

    name: str
    status: Health
    detail: str
    lost: str | None = None
    remedy: str | None = None
    fixable: bool = False


def ok(name: str, detail: str) -> Finding:
    return Finding(name, Health.OK, detail)


def degraded(name: str, detail: str, lost: str, remedy: str, *, fixable: bool = False) -> Finding:
    return Finding(name, Health.DEGRADED, detail, lost, remedy, fixable)


def failing(name: str, detail: str, lost: str, remedy: str, *, fixable: bool = False) -> Finding:
    return Finding(name, Health.FAILING, detail, lost, remedy, fixable)
