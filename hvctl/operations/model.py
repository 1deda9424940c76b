"""model: train on series, list, show, evaluate, promote, go back. A model that was trained is in use only after it has
beaten both the current one and the best rules on the newest days, of VMs that it has not seen."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from hvctl.adapters.models import seriesfile
from hvctl.adapters.models.boosters import Boosters
from hvctl.adapters.models.boostertraining import MEMORY, Lesson
from hvctl.adapters.models.boostertraining import train as train_in_child
from hvctl.adapters.models.modelstore import ModelStore
from hvctl.errors import HvctlError, RefusedError
from hvctl.forecasting.arbiter import Standing
from hvctl.forecasting.features import FEATURES, feature_hash
from hvctl.forecasting.lessons import PARAMETERS, PRICING, QUANTILES, drawn, material, parameters
from hvctl.forecasting.panel import PATIENCE, Panel, key_of, voice
from hvctl.forecasting.rulebook import Rulebook, load_book
from hvctl.forecasting.series import F32, RESOURCES, TARGETS, Series
from hvctl.forecasting.spread import Spread
from hvctl.forecasting.trial import DAY, QUANTILE, Split, Trial, split, trial
from hvctl.model.forecast import Answerer, Level, Metric, ModelCard
from hvctl.settings import Settings

ROWS = 160_000
_VMS = (60.0, 20.0, 20.0)
_DAYS = (70.0, 85.0)
_FEW_VMS = 30
_SHORT = 0.02  # of a coverage: what is worth a word

Say = Callable[[str], None]


def train(
    settings: Settings, data: Path, say: Say, *, rows: int = ROWS, seconds: float = 3600, memory: int = MEMORY
) -> ModelCard:
    """A new set, judged on a fifth of the VMs in the last days; it is in use only after `promote`. seconds and memory
    (bytes) limit the child that trains."""
    series = seriesfile.read(data)
    sp = split(series, _VMS, _DAYS)
    features: dict[str, F32] = {}
    lessons: list[Lesson] = []
    resources = [r for r in RESOURCES if r in series.values]
    cases = drawn(sp.train, 0, sp.train_end, rows)
    for resource in resources:
        made = material(series, resource, cases)
        features[resource] = made.x
        say(f"{resource}: {len(made.x)} cases of {made.vms} VMs")
        lessons += [
            Lesson(
                key_of(resource, t, q), resource, made.targets[t], made.weight, q, PRICING, parameters(q, len(made.x))
            )
            for t in TARGETS
            for q in QUANTILES
        ]
    trained = train_in_child(features, lessons, seconds=seconds, memory=memory, progress=say)
    now = datetime.now(UTC)
    known = hashlib.sha256("".join(t.text for t in trained.values()).encode()).hexdigest()[:8]
    card = ModelCard(
        id=f"{now:%Y%m%d-%H%M%S}-{known}",
        created_at=now.isoformat(timespec="seconds").replace("+00:00", "Z"),
        data=data.name,
        vms=len(sp.train),
        days=round(sp.train_end / DAY, 2),
        rows=len(cases),
        features=feature_hash(),
        feature_count=len(FEATURES),
        parameters={**PARAMETERS, "pricing": PRICING},
        files={},
    )
    texts = {key: t.text for key, t in trained.items()}
    judged = _trials(series, sp, Boosters.of(card, texts), resources)
    return ModelStore(settings).add(described(card, judged), texts)


def described(card: ModelCard, judged: dict[str, Trial]) -> ModelCard:
    """The card with what the trials say, and where the models do not win."""
    book = Rulebook({key: choices for t in judged.values() for key, choices in t.choices.items()})
    whole = replace(
        card,
        metrics=tuple(t.metric for t in judged.values()),
        shifts={key: t.shift for key, t in judged.items()},
        spreads={key: levels for t in judged.values() for key, levels in t.spreads.items()},
        rates={voice(Answerer.MODEL, t.metric.resource, t.metric.target[:4]): t.rates for t in judged.values()},
        rulebook={key: {h: (str(r), str(k), float(a)) for h, (r, k, a) in v.items()} for key, v in book.dump().items()},
    )
    return replace(whole, limits=limits(whole, list(whole.metrics)))


def limits(card: ModelCard, metrics: list[Metric]) -> tuple[str, ...]:
    lost = [f"{m.resource} {m.target}: loses {-m.gain:.0%} to {m.baseline}" for m in metrics if m.gain <= 0]
    mixed = [
        f"{m.resource} {m.target}: loses {-m.gain_composite:.0%} to the best rule of each length of history"
        for m in metrics
        if m.gain_composite <= 0 < m.gain
    ]
    unsure = [
        f"{m.resource} {m.target}: the gain of {m.gain:.0%} is not sure, its interval begins at {m.interval[0]:.0%}"
        for m in metrics
        if m.gain > 0 >= m.interval[0]
    ]
    few = (
        [f"{card.vms} VMs are few: below about {_FEW_VMS} a model only equals the rules"]
        if card.vms <= _FEW_VMS
        else []
    )
    return (
        *lost,
        *mixed,
        *unsure,
        *(_short(voice, levels) for voice, levels in card.spreads.items() if _shortfall(levels[-1]) > _SHORT),
        *few,
        "5-minute means: peaks within 5 minutes are higher than what it forecasts",
        "trained on series without restarts: it knows nothing of what a cold boot needs",
        "on another fleet a rule can be better: there it answers only where it has won",
    )


def _shortfall(level: Level) -> float:
    return 0.0 if level.coverage is None else level.quantile - level.coverage


def _short(voice: str, levels: tuple[Level, ...]) -> str:
    return f"{voice.replace('-', ' ')}: the {levels[-1].quantile:g} quantile covered {levels[-1].coverage:.1%} of cases"


def _trials(series: Series, sp: Split, models: Boosters, resources: list[str]) -> dict[str, Trial]:
    return {
        key_of(resource, target, QUANTILE): trial(series, sp, resource, target, models)
        for resource in resources
        for target in TARGETS
    }


def evaluate(settings: Settings, data: Path, name: str | None = None) -> list[Metric]:
    """A set (the current one) on the newest days of the data, on VMs that a training on it holds out."""
    series = seriesfile.read(data)
    sp = split(series, _VMS, _DAYS)
    models = ModelStore(settings).open(name)
    return [t.metric for t in _trials(series, sp, models, [r for r in RESOURCES if r in series.values]).values()]


def promote(settings: Settings, name: str, data: Path, *, dry_run: bool = False) -> tuple[Metric, ...]:
    """Use a set from now on. RefusedError, with both figures, unless its mean loss on the newest held-out days is below
    the current set's and below the best rules'; a current set that cannot be loaded is no hindrance."""
    store = ModelStore(settings)
    new = evaluate(settings, data, name)
    current = store.current()
    if name == current:
        raise RefusedError(f"the model {name} is in use already.", "hvctl model list")
    # Relative losses, so that a resource with large numbers does not decide alone.
    ratio = float(np.mean([1 - m.gain for m in new]))
    if ratio >= 1:
        raise RefusedError(
            f"the model {name} is not better than the rules: its loss is {ratio:.3f} of theirs.", "hvctl model train"
        )
    try:
        old = evaluate(settings, data, current)
    except HvctlError:
        old = []
    if old:
        against = float(np.mean([n.pinball / max(o.pinball, 1e-12) for n, o in zip(new, old, strict=True)]))
        if against >= 1:
            raise RefusedError(
                f"the model {name} is not better than {current}: its loss is {against:.3f} of that one's.",
                "hvctl model train",
            )
    if not dry_run:
        store.promote(name)
    return tuple(new)


def rollback(settings: Settings, *, dry_run: bool = False) -> str:
    """The name of the set that is in use again; RefusedError if there is none to go back to."""
    return ModelStore(settings).rollback(dry_run=dry_run)


def listed(settings: Settings) -> tuple[str, tuple[ModelCard, ...]]:
    """The name of the set in use, and all cards."""
    store = ModelStore(settings)
    return store.current(), store.cards()


def show(settings: Settings, name: str | None) -> ModelCard:
    store = ModelStore(settings)
    return store.card(store.current() if name is None else name)


def panel(settings: Settings, standings: Mapping[str, Standing] | None = None) -> Panel:
    """Everybody who may answer, with the set in use; without models, and with the reason, if it is missing, changed or
    of other features: then the rules answer. standings: the arbiter's record of this fleet."""
    store = ModelStore(settings)
    known: Mapping[str, Standing] = standings or {}
    try:
        card = store.card(store.current())
    except HvctlError as e:
        return Panel(missing=e.message, standings=known)
    try:
        book = load_book({key: {str(h): c for h, c in v.items()} for key, v in card.rulebook.items()})
    except HvctlError as e:
        return Panel(missing=e.message, standings=known)
    spreads = {key: Spread(levels) for key, levels in card.spreads.items()}
    age = (datetime.now(UTC) - datetime.fromisoformat(card.created_at)).total_seconds()
    try:
        models = store.open(card.id)
    except HvctlError as e:
        return Panel(book=book, missing=e.message, standings=known, spreads=spreads)
    return Panel(
        book, models, "", card.id, max(age, 0.0), PATIENCE, known, card.shifts, rates=card.rates, spreads=spreads
    )
