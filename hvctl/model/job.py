"""Jobs of a node's daemon: how one run went, and what is paused."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class RunState(StrEnum):
    """busy: somebody else held what it needs, and its next turn comes."""

    DONE = "done"
    FAILED = "failed"
    BUSY = "busy"


@dataclass(frozen=True, slots=True)
class JobRun:
    """started_at is seconds since 1970, seconds how long it took; by is "daemon", "once" or who called it by hand."""

    job: str
    started_at: float
    seconds: float
    state: RunState
    detail: str = ""
    by: str = ""
    id: int | None = None


@dataclass(frozen=True, slots=True)
class JobPause:
    """job None: every automatic action of the host."""

    job: str | None
    since: float
    who: str
