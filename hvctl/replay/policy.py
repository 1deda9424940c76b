"""A policy as data: what VMs are allocated, what is kept for those that were interrupted, and who goes for a demand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from hvctl.decide.interrupt import Choose
from hvctl.model.allocation import Resources
from hvctl.model.guard import Watch
from hvctl.model.pool import Rung
from hvctl.packing.choose import cheapest_cover
from hvctl.packing.cover import Candidate, Cover


class Amount(StrEnum):
    """Of what a VM is promised, or what is kept for its return. forecast: the 0.95 quantile of its next hour's peak.
    percent: a fixed share of its size. full: its size. none: nothing."""

    FORECAST = "forecast"
    PERCENT = "percent"
    FULL = "full"
    NONE = "none"


class Victims(StrEnum):
    CHEAPEST = "cheapest"
    LOWEST_PRIORITY = "lowest-priority"


@dataclass(frozen=True, slots=True)
class Policy:
    """allocate is looked at anew `every` seconds; percent is of a VM's size, 0 to 100.

    lasts: for how many seconds a VM is taken to need what it needs more (None: for ever); back: seconds after which its
    victims are due; rungs: what may be done to them. insist: it gets that although victims could not come back when
    they are due; otherwise its demand is not met then. press: who was found at the limit of what it is promised has so
    many times as much at the next step (1: no more). guard: it looks at every VM that is not guaranteed instead."""

    name: str
    description: str = ""
    allocate: Amount = Amount.FORECAST
    reserve: Amount = Amount.FORECAST
    victims: Victims = Victims.CHEAPEST
    percent: float | None = None
    every: float = 3600.0
    back: float = 3600.0
    press: float = 1.5
    lasts: float | None = None
    grace: float = 30.0
    rungs: tuple[Rung, ...] = (Rung.SQUEEZE, Rung.PAUSE, Rung.SAVE)
    insist: bool = False
    guard: Watch | None = None

    @property
    def pressing(self) -> float:
        """press, or 1 where a guard looks: who is at its limit then keeps what it has, and grows by the guard."""
        return self.press if self.guard is None else 1.0

    def choice(self, priority: Mapping[str, int]) -> Choose:
        """priority: by UUID."""
        return cheapest_cover if self.victims is Victims.CHEAPEST else lowest_priority_first(priority)


def lowest_priority_first(priority: Mapping[str, int]) -> Choose:
    """The usual preemption: in the order of priority until it suffices, whatever it costs."""

    def choose(candidates: Sequence[Candidate], lacking: Mapping[str, Resources]) -> Cover | None:
        ((host, need),) = lacking.items()
        chosen: list[Candidate] = []
        total = Resources()
        for one in sorted(candidates, key=lambda c: (priority[c.key], c.key)):
            if not (need - total).any:
                break
            if one.gives.least(need - total).any:
                chosen.append(one)
                total += one.gives
        if (need - total).any:
            return None
        return Cover(host, tuple(c.key for c in chosen), sum(c.cost for c in chosen), 0.0)

    return choose
