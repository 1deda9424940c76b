"""The question and its answer: candidates that could give what a host lacks, and the cheapest set of them found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hvctl.model.allocation import Resources

COUNTED = ("cpu", "memory", "network", "iops")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A VM that may be chosen: what it gives back of its host, and what that costs (any unit, above 0)."""

    key: str
    host: str
    cost: float
    gives: Resources


@dataclass(frozen=True, slots=True)
class Cover:
    """A set of candidates of one host that gives what is lacking there; none of them can be left out.

    bound: no cover on any host costs less than this."""

    host: str
    keys: tuple[str, ...]
    cost: float
    bound: float

    @property
    def gap(self) -> float:
        """How much dearer than the cheapest cover it may be, as a share of that one's cost."""
        return self.cost / self.bound - 1 if self.bound > 0 else 0.0


def covers(given: Iterable[Resources], lacking: Resources) -> bool:
    total = sum(given, Resources())
    return all(getattr(total, name) >= getattr(lacking, name) for name in COUNTED)
