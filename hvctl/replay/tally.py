"""What a replay adds up: what was demanded, served, promised and kept, step by step, and what happened to VMs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from hvctl.forecasting.series import F64, STEP
from hvctl.model.guard import GuardDecision
from hvctl.replay.fleet import COUNTED

HIGH: Final = 500
"""What a priority is that nobody has set."""
_SCALE: Final = {"cpu": 1.0, "memory": 1 / 1024}  # from cores, MiB


@dataclass(frozen=True, slots=True)
class Event:
    """at is seconds since 1970; kind: started, interrupted, returned, waits, or guarded: it grew by a guard; delayed or
    refused: it needs more, and nobody goes for it (yet)."""

    at: float
    vm: str
    kind: str
    detail: str = ""


@dataclass
class Tally:
    """Sums over time of each resource, in cores and MiB times steps; rows of `shown` are the steps: demand, served,
    promised and kept, for the picture. away: what of the unserved demand was of VMs that did not run; high: what of it
    was of those whose priority is above HIGH. guard_actions: by what was done."""

    steps: int
    demand: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0.0))
    served: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0.0))
    away: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0.0))
    high: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0.0))
    promised: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0.0))
    kept: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0.0))
    interruptions: dict[str, int] = field(default_factory=dict)
    returns: int = 0
    waited: int = 0
    waits: list[float] = field(default_factory=list)
    guard_looks: int = 0
    guard_actions: dict[str, int] = field(default_factory=dict)
    shown: dict[str, F64] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shown = {r: np.zeros((self.steps, 4)) for r in COUNTED}

    def step(self, number: int, resource: str, found: Mapping[str, float]) -> None:
        """found: by the names of the sums."""
        for name, value in found.items():
            getattr(self, name)[resource] += value
        self.shown[resource][number] = [found[name] for name in ("demand", "served", "promised", "kept")]

    def look(self, decision: GuardDecision) -> None:
        """A guard looked at a VM, and did what it decided."""
        self.guard_looks += 1
        if decision.chosen is not None:
            name = decision.chosen.name
            self.guard_actions[name] = self.guard_actions.get(name, 0) + 1

    def row(self, policy: str) -> dict[str, Any]:
        """Flat, in core-seconds and GiB-seconds: unserved = demand - served; reserved is what nobody else could have
        (promises, and what is kept for returns beyond them), unused what of it served nobody. Waits are seconds from
        when a return was due."""
        row: dict[str, Any] = {
            "policy": policy,
            "interruptions": sum(self.interruptions.values()),
            "by_rung": dict(sorted(self.interruptions.items())),
            "returns": self.returns,
            "waited": self.waited,
            "wait_mean": float(np.mean(self.waits)) if self.waits else 0.0,
            "wait_max": max(self.waits, default=0.0),
            "guard_looks": self.guard_looks,
            "guard_actions": dict(sorted(self.guard_actions.items())),
        }
        for resource in COUNTED:
            factor = STEP * _SCALE[resource]
            reserved = self.promised[resource] + self.kept[resource]
            found = {
                "demand": self.demand[resource],
                "unserved": self.demand[resource] - self.served[resource],
                "unserved_away": self.away[resource],
                "unserved_high": self.high[resource],
                "reserved": reserved,
                "kept": self.kept[resource],
                "unused": reserved - self.served[resource],
            }
            row |= {f"{resource}_{name}": value * factor for name, value in found.items()}
        return row
