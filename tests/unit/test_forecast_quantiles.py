"""Every quantile that is asked for: none ever cross, none depends on what else is asked, and each states the coverage
that was measured."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvctl.adapters.models.boosters import Silence
from hvctl.forecasting.arbiter import Standing
from hvctl.forecasting.forecast import forecast
from hvctl.forecasting.margin import Kind, Margin, OnlineMargin
from hvctl.forecasting.panel import Ask, Panel, voice
from hvctl.forecasting.rulebook import Choice, Rulebook
from hvctl.forecasting.series import F32
from hvctl.forecasting.spread import LEVELS, MEDIAN, NORMAL, UPPER, Spread, calibrated, spread, value
from hvctl.model.forecast import Answerer, Level
from unit.fleets import fleet

FLEET = fleet(3, 2, resources=("cpu",))
RULES = ("last", "max_1h", "max_7d", "aim_p50_24h", "mean_1h")
quantiles = st.floats(0.5, 0.99)


class Two:
    """A model with a word for the median and one for the upper quantile; None is silence."""

    def __init__(self, median: float | None, upper: float | None) -> None:
        self.words = {"0.5": median, "0.95": upper}

    def within(self, seconds: float) -> Ask:
        return self.say

    def say(self, key: str, x: F32) -> F32 | Silence:
        word = self.words[key.rpartition("-")[2]]
        return Silence("it is asleep") if word is None else np.full(len(x), word, np.float32)


@st.composite
def panels(draw: st.DrawFn) -> Panel:
    """Anything that a card or a record may hold: rules that contradict each other, and places out of proportion."""
    word = st.one_of(st.none(), st.floats(-4, 4))
    amount = st.floats(0, 5)
    book, spreads, margins = {}, {}, {}
    for target in ("peak", "mean"):
        for q in ("0.5", "0.95"):
            if draw(st.booleans()):
                rule = Choice(draw(st.sampled_from(RULES)), Margin(draw(st.sampled_from(Kind)), draw(amount)))
                book[f"cpu-{target}-{q}"] = {12: rule}
        for by in (Answerer.MODEL, Answerer.BASELINE):
            places = sorted(draw(st.lists(st.floats(0, 3), min_size=len(LEVELS), max_size=len(LEVELS))))
            added = sorted(draw(st.lists(st.floats(0, 3), min_size=2, max_size=2)))
            if draw(st.booleans()):
                spreads[voice(by, "cpu", target)] = Spread(
                    tuple(
                        Level(q, p, m, None)
                        for q, p, m in zip(LEVELS, _anchored(places), [0.0] * 6 + added, strict=True)
                    )
                )
            if draw(st.booleans()):
                margin = margins[voice(by, "cpu", target)] = OnlineMargin(3, UPPER)
                margin.fleet = draw(st.floats(-0.2, 3))
    standings = {f"cpu-{t}": Standing(model=draw(st.booleans())) for t in ("peak", "mean")}
    models = Two(draw(word), draw(word))
    return Panel(Rulebook(book), models, "", "m", standings=standings, margins=margins, spreads=spreads)


def _anchored(places: list[float]) -> list[float]:
    at = LEVELS.index(UPPER)
    return [0.0, *(min(p, 1.0) for p in places[1:at]), 1.0, *(max(p, 1.0) for p in places[at + 1 :])]


@settings(max_examples=60, deadline=None)
@given(panel=panels(), asked=st.lists(quantiles, min_size=1, max_size=3, unique=True))
def test_no_quantiles_cross_and_each_is_the_same_alone(panel: Panel, asked: list[float]) -> None:
    asked = sorted({*asked, MEDIAN, UPPER})
    together = forecast(FLEET, panel, resources=["cpu"], quantiles=asked)
    for vm in FLEET.vms:
        lines = [f for f in together if f.vm == vm]
        assert [f.quantile for f in lines] == asked
        for low, high in pairwise(lines):
            assert low.peak <= high.peak
            assert low.mean <= high.mean
        assert all(0 <= f.mean <= f.peak <= 40 for f in lines)
    alone = [forecast(FLEET, panel, resources=["cpu"], quantiles=(q,)) for q in asked]
    order = {q: i for i, q in enumerate(asked)}
    assert all(alone[order[f.quantile]][FLEET.vms.index(f.vm)] == f for f in together)


def test_a_median_of_a_rule_lifts_no_upper_quantile() -> None:
    book = Rulebook({"cpu-peak-0.95": {12: Choice("last", Margin(Kind.TIMES, 0.1))}})
    both = forecast(FLEET, Panel(book=book), resources=["cpu"])
    assert [f.peak for f in both if f.quantile == 0.95] == [
        f.peak for f in forecast(FLEET, Panel(book=book), resources=["cpu"], quantiles=(0.95,))
    ]
    plain = forecast(FLEET, Panel(), resources=["cpu"])
    assert {f.rule for f in plain if f.quantile == 0.5} == {"aim_p50_24h"}
    low, high = (sum(f.peak for f in plain if f.quantile == q) for q in (0.5, 0.95))
    assert low < 0.9 * high


def test_every_value_lies_between_its_ends() -> None:
    median, upper = np.array([1, 2, 0], np.float32), np.array([1, 8, 0], np.float32)
    assert value(median, upper, 0.0, 0.0, 0.1) is median
    assert value(median, upper, 1.0, 0.0, 0.1) is upper
    np.testing.assert_allclose(value(median, upper, 0.5, 0.0, 1e-6), [1, 4, 0], rtol=1e-4)
    np.testing.assert_allclose(value(median, upper, 1.5, 0.0, 1e-6), [1, 16, 0], rtol=1e-4)
    np.testing.assert_allclose(value(median, upper, 1.0, np.log(2), 1e-6), [2, 16, 1e-6], rtol=1e-4)
    assert NORMAL.at(0.8) == (pytest.approx(0.842 / 1.645, abs=1e-3), 0)
    assert NORMAL.coverage(0.8) is None


def test_places_that_were_calibrated_cover_what_they_state() -> None:
    """A demand with a heavy tail, which the normal law places wrongly."""
    rng = np.random.default_rng(4)

    def drawn(n: int) -> F32:
        return np.exp(rng.standard_t(2, n) * 0.4).astype(np.float32)

    def ends(n: int) -> tuple[F32, F32, F32, F32]:
        level, none = np.float32(np.exp(0.4 * 2.92)), np.zeros(n, np.float32)
        return np.ones(n, np.float32), np.full(n, level, np.float32), none, np.full(n, np.nan, np.float32)

    actual, test = drawn(40_000), drawn(40_000)
    median, upper, floor, size = ends(40_000)
    found = spread(calibrated(actual, median, upper, floor), test, median, upper, floor, size)
    assert [level.quantile for level in found.levels] == list(LEVELS)
    for level in found.levels:
        assert level.coverage == pytest.approx(level.quantile, abs=0.01)
    told = value(median, upper, *found.at(0.85), floor)
    assert float((test <= told).mean()) == pytest.approx(0.85, abs=0.01)
    assert found.coverage(0.85) == pytest.approx(0.85, abs=0.01)
    panel = Panel(spreads={voice(Answerer.BASELINE, "cpu", "peak"): found})
    (line, *_) = forecast(FLEET, panel, resources=["cpu"], quantiles=(0.85,))
    assert line.coverage == found.coverage(0.85)


def test_places_and_margins_stay_on_their_side_whatever_the_cases_say() -> None:
    """Demand that never exceeds the median, and demand that always exceeds the upper quantile."""
    ones, none = np.ones(50, np.float32), np.zeros(50, np.float32)
    for actual, added in ((0.5 * ones, 0), (9 * ones, np.log(4.5))):
        found = calibrated(actual, ones, 2 * ones, none)
        assert (found[MEDIAN], found[UPPER]) == ((0, 0), (1, 0))
        assert all(0 <= place <= 1 and margin == 0 for q, (place, margin) in found.items() if q < UPPER)
        assert all(m == (1, pytest.approx(added, rel=1e-4)) for q, m in found.items() if q > UPPER)


def test_the_nodes_own_record_states_the_upper_coverage() -> None:
    found = Spread(tuple(Level(q, float(q > 0.5), 0.0, q - 0.01) for q in (0.5, 0.95)))
    key = voice(Answerer.BASELINE, "cpu", "peak")
    panel = Panel(spreads={key: found}, coverages={key: 0.97})
    low, high, *_ = forecast(FLEET, panel, resources=["cpu"])
    assert (low.coverage, high.coverage) == (pytest.approx(0.49), 0.97)
