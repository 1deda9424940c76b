"""Everybody who may answer a question about demand, and what each says of one resource: models with their margins,
rules with theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

import numpy as np

from hvctl.forecasting.arbiter import Standing
from hvctl.forecasting.features import Features
from hvctl.forecasting.margin import Known, OnlineMargin, capped
from hvctl.forecasting.rulebook import Rulebook
from hvctl.forecasting.series import F32, FLOOR, I64
from hvctl.forecasting.spread import NORMAL, UPPER, Spread
from hvctl.model.forecast import Answerer

PATIENCE: Final = 0.1
"""Seconds that anybody who asks about one VM waits for a model."""


class Silent(Protocol):
    """No answer, and why."""

    @property
    def reason(self) -> str: ...


Ask: TypeAlias = "Callable[[str, F32], F32 | Silent]"
"""By key: the logarithmic ratio of each row."""


class Models(Protocol):
    """What the boosters are to this module. What is asked through one `within` takes no longer than that in all."""

    def within(self, seconds: float) -> Ask: ...


@dataclass(frozen=True, slots=True)
class Panel:
    """models: None with missing telling why there are none; patience is the seconds that one answer may wait for them.
    standings: by key without the quantile ("cpu-peak"); nobody's standing lets the rule answer. shifts: by full key,
    logarithmic, of models that have no margin yet.

    By the key of `voice`: margins (of the 0.95 quantile, in the order of the series' VMs), rates (how fast they follow
    a VM and the fleet, where that was tuned), spreads (the other quantiles) and coverages (of the 0.95 quantile, as
    this node's own record has it).
    """

    book: Rulebook = field(default_factory=lambda: Rulebook({}))
    models: Models | None = None
    missing: str = "there is no model"
    name: str | None = None
    age: float | None = None
    patience: float = PATIENCE
    standings: Mapping[str, Standing] = field(default_factory=dict)
    shifts: Mapping[str, float] = field(default_factory=dict)
    margins: Mapping[str, OnlineMargin] = field(default_factory=dict)
    rates: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    spreads: Mapping[str, Spread] = field(default_factory=dict)
    coverages: Mapping[str, float] = field(default_factory=dict)

    def spread(self, answerer: Answerer, resource: str, target: str) -> Spread:
        return self.spreads.get(voice(answerer, resource, target), NORMAL)

    def coverage(self, answerer: Answerer, resource: str, quantile: float) -> float | None:
        """Of peaks: on this node's record, or else on the card's; None: nobody knows."""
        own = self.coverages.get(voice(answerer, resource, "peak")) if quantile == UPPER else None
        return self.spread(answerer, resource, "peak").coverage(quantile) if own is None else own


def key_of(resource: str, target: str, quantile: float) -> str:
    """target: peak or mean."""
    return f"{resource}-{target}-{quantile:g}"


def voice(answerer: Answerer, resource: str, target: str) -> str:
    """Who says what: models and rules have margins and spreads of their own."""
    return f"{answerer.value}-{resource}-{target}"


def noise(resource: str, largest: F32) -> F32:
    """What is added to both sides of a ratio, [vms]: the resource's floor and a hundredth of the largest demand seen,
    as in features."""
    return np.asarray(FLOOR[resource] + 0.01 * largest, np.float32)


class Asked:
    """Peak or mean of one resource of all VMs, with what each rule says of them and the history of each in slots."""

    def __init__(
        self, panel: Panel, resource: str, target: str, said: Mapping[str, F32], size: F32, history: I64
    ) -> None:
        self.panel, self.resource, self.target, self.history = panel, resource, target, history
        self._said = said
        self.known = Known(size, said["max_7d"])
        self.noise = noise(resource, self.known.largest)

    def model(self, quantile: float, ask: Ask, made: Features) -> F32 | str:
        """With its margin, or why there is no answer. quantile is one that models are made for."""
        panel, size = self.panel, self.known.size
        key = key_of(self.resource, self.target, quantile)
        word = ask(key, made.x)
        if not isinstance(word, np.ndarray):
            return word.reason
        value = made.value(word)
        margin = panel.margins.get(voice(Answerer.MODEL, self.resource, self.target)) if quantile == UPPER else None
        if margin is not None:
            return margin.apply(np.arange(len(value)), value, made.floor, size)
        return capped((value + made.floor) * np.float32(np.exp(panel.shifts.get(key, 0.0))) - made.floor, size)

    def rule(self, quantile: float) -> F32:
        key = key_of(self.resource, self.target, quantile)
        value = self.panel.book.answer(key, self._said, self.history, self.known, FLOOR[self.resource])
        margin = self.panel.margins.get(voice(Answerer.BASELINE, self.resource, self.target))
        if margin is None or quantile != UPPER:
            return value
        return margin.apply(np.arange(len(value)), value, self.noise, self.known.size)

    def rule_names(self, quantile: float) -> tuple[str, ...]:
        key = key_of(self.resource, self.target, quantile)
        return tuple(self.panel.book.of(key, int(h)).rule for h in self.history)
