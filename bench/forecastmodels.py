"""The models that a forecasting benchmark judges: taught now, in the child process that hvctl trains in, or shipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hvctl.adapters.models.boosters import Boosters, Silence
from hvctl.adapters.models.boostertraining import Lesson, train
from hvctl.adapters.models.modelstore import SHIPPED, ModelStore
from hvctl.forecasting.features import FEATURES, feature_hash
from hvctl.forecasting.lessons import PRICING, QUANTILES, material, parameters
from hvctl.forecasting.series import F32, RESOURCES, TARGETS, Cases, Series
from hvctl.model.forecast import ModelCard
from hvctl.settings import Settings


@dataclass(frozen=True, slots=True)
class Taught:
    boosters: Boosters
    seconds: float = 0.0
    sizes: Mapping[str, int] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

    def within(self, seconds: float) -> Callable[[str, F32], F32 | Silence]:
        return self.boosters.within(seconds)

    def answer(self, key: str, x: F32) -> F32:
        said = self.boosters.predict(key, x, 600.0)
        if isinstance(said, Silence):
            raise RuntimeError(said.reason)
        return said


def shipped() -> Taught:
    store = ModelStore(Settings())
    found = store.open(SHIPPED)
    texts = {key: (store.folder(SHIPPED) / f"{key}.txt").read_text() for key in found.card.files}
    return Taught(found, 0.0, {k: len(t) for k, t in texts.items()}, texts)


def teach(series: Series, cases: Cases, say: Callable[[str], None], quantiles: tuple[float, ...] = QUANTILES) -> Taught:
    """One model for each resource, target and quantile; the seconds are those of features and training."""
    began = time.perf_counter()
    features: dict[str, Any] = {}
    lessons: list[Lesson] = []
    for resource in (r for r in RESOURCES if r in series.values):
        m = material(series, resource, cases)
        features[resource] = m.x
        lessons += [
            Lesson(f"{resource}-{t}-{q:g}", resource, m.targets[t], m.weight, q, PRICING, parameters(q, len(m.x)))
            for t in TARGETS
            for q in quantiles
        ]
    say(f"features of {len(cases)} cases: {time.perf_counter() - began:.1f} s")
    trained = train(features, lessons, progress=say)
    seconds = time.perf_counter() - began
    card = ModelCard("benchmark", "", "", len(series.vms), 0.0, len(cases), feature_hash(), len(FEATURES), {}, {})
    texts = {key: t.text for key, t in trained.items()}
    return Taught(Boosters.of(card, texts), seconds, {k: len(t) for k, t in texts.items()}, texts)
