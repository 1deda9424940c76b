"""What a VM needed right after one of its starts: hvctl's own record of interruptions, which no trace holds; and how
far off was what had been predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Restart:
    """at is the epoch of the start, span the seconds after it that were looked at, gap how long the VM was off before
    (None: its first start that is known).

    peak and mean are the demand in the span by resource, peak that of single samples; before is the peak of the hour
    before it was interrupted. All are in the resources' own units (cores, MiB, KB/s, Mbit/s, 1/s); a resource that was
    not measured is absent.
    """

    vm_uuid: str
    image: str | None
    at: float
    gap: float | None
    span: int
    peak: Mapping[str, float]
    mean: Mapping[str, float] = field(default_factory=dict)
    before: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ForecastError:
    """One resource in the first `span` seconds after a return, in the unit of Restart: the peak that was predicted when
    the VM was interrupted, and the one that came."""

    resource: str
    span: int
    predicted: float
    needed: float

    @property
    def ratio(self) -> float | None:
        """needed / predicted: above 1 it lacked; None where nothing was predicted to be needed."""
        return self.needed / self.predicted if self.predicted > 0 else None


@dataclass(frozen=True, slots=True)
class RestartNeed:
    """The predicted peak of one resource after the next start: by which rule, learned from how many starts of whom."""

    value: float
    quantile: float
    rule: str
    learned_from: str
    restarts: int
    loss: float
