"""A forecast: what a VM will need at most with a stated probability, and who says so. A model card says what a set of
models was made from, and where it does not win."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Answerer(StrEnum):
    """Which rule a forecast comes from."""

    MODEL = "model"
    BASELINE = "baseline"
    TOO_LITTLE_HISTORY = "too little history"
    RESTARTS = "earlier restarts"


@dataclass(frozen=True, slots=True)
class Forecast:
    """Demand of one resource of one VM over `horizon` seconds that begin `gap` seconds from now.

    peak and mean are in `unit` (peak: the largest 5-minute mean); quantile is the share of cases that should stay
    below, coverage the share of peaks that did: on this node's record where that is long enough, otherwise on the
    card's (None: there is no record yet). rule is the baseline's name, or the model's, for the peak; mean_answered and
    mean_rule are of the mean. model and model_age (seconds) are None where no model is there. history is the seconds of
    the past that were seen. reason tells why this one answered.
    """

    vm: str
    resource: str
    unit: str
    quantile: float
    horizon: int
    gap: int
    peak: float
    mean: float
    coverage: float | None
    answered: Answerer
    rule: str
    mean_answered: Answerer
    mean_rule: str
    history: int
    reason: str
    model: str | None = None
    model_age: float | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of a card: gains are 1 - loss / loss of the opponent on VMs and days that the models never saw."""

    resource: str
    target: str
    pinball: float
    baseline: str
    baseline_pinball: float
    gain: float
    interval: tuple[float, float]
    gain_composite: float
    coverage: float


@dataclass(frozen=True, slots=True)
class Level:
    """One quantile of a spread: its place on the line from the median (0) to the 0.95 quantile (1), the logarithm that
    is added there, and the share of cases that stayed below on VMs and days that were not tuned on (None: unknown)."""

    quantile: float
    place: float
    margin: float
    coverage: float | None


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One set of models. files: key (resource-target-quantile) to the SHA-256 of the text file KEY.txt beside the card.

    features is the SHA-256 of the list of features, in their order; days is the span. shifts: key to the logarithmic
    margin of the calibration. rulebook: which rule, with which margin, answers beside it, by key and length of history.
    spreads: answerer-resource-target to its other quantiles; rates: likewise, how fast the online margins of a VM and
    of the fleet follow. limits say in plain words where it does not win.
    """

    id: str
    created_at: str
    data: str
    vms: int
    days: float
    rows: int
    features: str
    feature_count: int
    parameters: dict[str, float | int | str]
    files: dict[str, str]
    metrics: tuple[Metric, ...] = ()
    limits: tuple[str, ...] = ()
    shifts: dict[str, float] = field(default_factory=dict)
    rulebook: dict[str, dict[str, tuple[str, str, float]]] = field(default_factory=dict)
    spreads: dict[str, tuple[Level, ...]] = field(default_factory=dict)
    rates: dict[str, tuple[float, float]] = field(default_factory=dict)
