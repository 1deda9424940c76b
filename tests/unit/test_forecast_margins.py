"""Margins, the arbiter and scores, on data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from hvctl.errors import UsageError
from hvctl.forecasting.arbiter import MIN_CASES, MIN_VMS, Standing, learn
from hvctl.forecasting.lessons import drawn
from hvctl.forecasting.margin import (
    FLEET,
    FLEET_RATE,
    Kind,
    Known,
    Margin,
    OnlineMargin,
    covering,
    follow,
    quantile_of,
    tune,
)
from hvctl.forecasting.rulebook import DEFAULT, LENGTHS, Rulebook, composite, lengths, load_book
from hvctl.forecasting.score import gain_interval, pinball, score
from hvctl.forecasting.series import F32
from hvctl.forecasting.trial import hourly, split
from unit.fleets import fleet

RNG = np.random.default_rng(5)
ONES = np.ones(4000, np.float32)


def known(n: int, size: float = np.inf) -> Known:
    return Known(np.full(n, size, np.float32), np.ones(n, np.float32))


def test_a_tuned_margin_has_the_lowest_loss_of_its_kind() -> None:
    actual = RNG.gamma(2, 1, 4000).astype(np.float32)
    forecast = np.ones(4000, np.float32)
    facts = Known(np.full(4000, np.nan, np.float32), ONES)
    margin, loss = tune(actual, forecast, 0.95, ONES, facts, 0.0)
    for factor in (0.8, 0.95, 1.05, 1.3):
        other = Margin(margin.kind, margin.amount * factor)
        assert float(pinball(actual, other.apply(forecast, facts, 0.0), 0.95, ONES).mean()) >= loss
    assert float((actual <= margin.apply(forecast, facts, 0.0)).mean()) == pytest.approx(0.95, abs=0.005)


def test_covering_reserves_least_at_exactly_that_coverage() -> None:
    actual = RNG.gamma(2, 1, 4000).astype(np.float32)
    forecast = (actual * RNG.uniform(0.5, 1.2, 4000)).astype(np.float32)
    facts = Known(np.full(4000, np.nan, np.float32), ONES)
    margin, reserved = covering(actual, forecast, 0.95, ONES, facts, 0.0)
    told = margin.apply(forecast, facts, 0.0)
    assert float((actual <= told).mean()) == pytest.approx(0.95, abs=0.001)
    assert reserved == pytest.approx(float(told.mean()), rel=1e-3)


def test_a_margin_never_leaves_zero_and_size() -> None:
    forecast = np.array([0, 1, 5], np.float32)
    facts = Known(np.array([2, 2, np.nan], np.float32), np.ones(3, np.float32))
    assert Margin(Kind.TIMES, 3).apply(forecast, facts, 0).tolist() == [0, 2, 15]
    assert Margin(Kind.PLUS, -2).apply(forecast, facts, 0).tolist() == [0, 0, 3]
    assert Margin(Kind.LEVEL, 0.5).apply(forecast, facts, 0).tolist() == [0.5, 1.5, 5.5]


def drifting(rate: float, fleet_rate: float = 0.0) -> tuple[float, float, F32, F32]:
    """Twenty VMs whose demand doubles after a third of the time, against a forecast that was right before."""
    hours, vms = 900, 20
    vm = np.tile(np.arange(vms), hours)
    cut = np.repeat(np.arange(hours) * 12, vms)
    actual = RNG.lognormal(0, 0.5, len(vm)).astype(np.float32) * np.where(cut >= 300 * 12, 2, 1).astype(np.float32)
    forecast = np.full(len(vm), np.exp(0.5 * 1.645), np.float32)
    zero, endless = np.zeros(len(vm), np.float32), np.full(len(vm), np.inf, np.float32)
    told = follow(OnlineMargin(vms, 0.95, 0.0, rate, fleet_rate), vm, cut, cut + 12, forecast, actual, zero, endless)
    late = cut >= 600 * 12
    before = float((actual <= forecast)[late].mean())
    return before, float((actual <= told)[late].mean()), forecast, told


@pytest.mark.parametrize("rates", [(0.05, 0.0), (0.0, FLEET_RATE), (0.02, FLEET_RATE)])
def test_online_margins_restore_the_coverage_after_a_drift(rates: tuple[float, float]) -> None:
    before, after, forecast, told = drifting(*rates)
    assert before < 0.75
    assert after == pytest.approx(0.95, abs=0.02)
    assert (told >= forecast * 0.9999).all()


def test_without_a_rate_nothing_follows() -> None:
    before, after, _, _ = drifting(0.0)
    assert before == after


def test_an_online_margin_waits_for_enough_cases_and_forgets_nothing_by_nan() -> None:
    margin = OnlineMargin(2, 0.95, 0.1, 0.05, 0.0)
    vm = np.zeros(10, np.int64)
    margin.learn(vm, np.ones(10, np.float32))
    assert margin.of(np.array([0, 1])).tolist() == pytest.approx([0.1, 0.1])
    margin.learn(vm, np.full(10, np.nan, np.float32))
    margin.learn(vm, np.ones(10, np.float32))
    assert margin.of(np.array([0]))[0] == pytest.approx(0.1)
    margin.learn(vm, np.ones(10, np.float32))
    assert margin.of(np.array([0]))[0] == pytest.approx(0.1 + 30 * 0.05 * 0.95, rel=1e-5)
    assert margin.of(np.array([1]))[0] == pytest.approx(0.1)
    assert margin.drift()["vms"] == 1


def test_the_fleet_margin_is_for_vms_that_have_no_record_too() -> None:
    margin = OnlineMargin(200, 0.95, 0.0, 0.0)
    margin.learn(np.arange(FLEET), np.ones(FLEET, np.float32))
    assert margin.of(np.array([199]))[0] == pytest.approx(0.95 * FLEET_RATE)
    few = OnlineMargin(200, 0.95, 0.0, 0.0)
    few.learn(np.arange(1), np.ones(1, np.float32))
    assert few.of(np.array([199]))[0] == pytest.approx(0.95 * FLEET_RATE / FLEET)
    assert margin.drift()["fleet"] > few.drift()["fleet"] > 1


def test_no_margin_shrinks_a_forecast() -> None:
    margin = OnlineMargin(1, 0.95, 0.0, 0.5, 0.5)
    margin.learn(np.zeros(500, np.int64), np.zeros(500, np.float32))
    assert margin.apply(np.array([0]), np.array([3.0], np.float32), 0.0, np.array([np.nan], np.float32)).tolist() == [
        3.0
    ]


def test_an_outcome_counts_only_once_it_is_complete() -> None:
    """The same misses, complete too late for the last hour, leave that hour's forecast alone."""
    vm, cut = np.zeros(60, np.int64), np.arange(60) * 12
    forecast, actual = np.ones(60, np.float32), np.full(60, 9, np.float32)
    zero, endless = np.zeros(60, np.float32), np.full(60, np.inf, np.float32)
    told = [
        follow(OnlineMargin(1, 0.95, 0.0, 0.05, 0.0), vm, cut, cut + wait, forecast, actual, zero, endless)
        for wait in (12, 12 * 40)
    ]
    assert told[0][-1] > told[1][-1] == 1.0
    changed = actual.copy()
    changed[-1] = 0
    again = follow(OnlineMargin(1, 0.95, 0.0, 0.05, 0.0), vm, cut, cut + 12, forecast, changed, zero, endless)
    np.testing.assert_array_equal(again, told[0])


def test_weighted_quantiles() -> None:
    values = np.array([3, 1, 2, 4], np.float32)
    assert quantile_of(values, np.ones(4, np.float32), 0.5) == 2
    assert quantile_of(values, np.array([10, 1, 1, 1], np.float32), 0.5) == 3


def test_the_arbiter_starts_with_the_rule_and_switches_with_hysteresis() -> None:
    standing = Standing()
    assert not standing.model
    few = learn(standing, 0.5, 1.0, MIN_CASES - 1, MIN_VMS)
    assert not few.model
    assert "often enough" in few.reason
    assert not learn(standing, 0.5, 1.0, MIN_CASES, MIN_VMS - 1).model
    assert not learn(standing, 0.98, 1.0, MIN_CASES, MIN_VMS).model
    won = learn(standing, 0.9, 1.0, MIN_CASES, MIN_VMS)
    assert won.model
    between = learn(won, 1.02, 1.0, MIN_CASES, MIN_VMS)
    assert 0.95 < between.ratio < 1
    assert between.model
    lost = learn(between, 1.5, 1.0, MIN_CASES, MIN_VMS)
    assert not lost.model
    assert not learn(lost, 0.9, 1.0, 10, MIN_VMS).model


def test_the_arbiter_forgets() -> None:
    standing = learn(Standing(), 0.5, 1.0, 4000, 50)
    for _ in range(8):
        standing = learn(standing, 1.2, 1.0, 4000, 50)
    assert standing.ratio == pytest.approx(1.2, abs=0.01)


def test_a_rule_book_answers_by_the_length_of_the_history() -> None:
    history = np.repeat(np.array(LENGTHS), 50)
    actual = RNG.gamma(2, 1, 200).astype(np.float32) + 1
    found = {"good": actual * np.float32(0.9), "bad": RNG.gamma(2, 1, 200).astype(np.float32)}
    found["bad"][:50], found["good"][:50] = actual[:50], RNG.gamma(2, 9, 50)
    facts = known(200)
    chosen = composite(actual, found, 0.95, np.ones(200, np.float32), facts, 0.0, history)
    assert [chosen[h].rule for h in LENGTHS] == ["bad", "good", "good", "good"]
    book = Rulebook({"cpu-peak-0.95": chosen})
    np.testing.assert_allclose(book.answer("cpu-peak-0.95", found, history, facts, 0.0), actual, rtol=1e-4)
    assert load_book(book.dump()).dump() == book.dump()
    assert book.of("disk-peak-0.95", 12) == DEFAULT
    assert lengths(np.array([0, 12, 71, 72, 9999])).tolist() == [12, 12, 12, 72, 2016]
    with pytest.raises(UsageError):
        load_book({"cpu": {"x": ["rule", "times", 1.0]}})


def test_scores() -> None:
    actual, told = np.array([1, 2, 3, 4], np.float32), np.array([2, 2, 2, 8], np.float32)
    scale, vm = np.array([10, 10, 10, 10], np.float32), np.array([0, 0, 1, 1])
    s = score(actual, told, 0.95, scale, vm)
    assert s.pinball == pytest.approx((0.05 * 0.1 + 0 + 0.95 * 0.1 + 0.05 * 0.4) / 4)
    assert s.coverage == 0.75
    assert s.vm_coverage_p10 == pytest.approx(0.55)
    assert s.unserved == pytest.approx(0.1)
    low, high = gain_interval(np.full(4, 0.5, np.float32), np.ones(4, np.float32), vm)
    assert low == high == pytest.approx(0.5)


def test_no_part_of_a_split_sees_another() -> None:
    series = fleet(60, 12, resources=("cpu",))
    sp = split(series, (60, 20, 20), (60, 80))
    parts = [set(p.tolist()) for p in (sp.train, sp.calibration, sp.test)]
    assert sum(len(p) for p in parts) == len(set().union(*parts)) == 60
    assert all(parts)
    taught = drawn(sp.train, 0, sp.train_end, 5000)
    assert int((taught.cut + taught.gap + taught.horizon).max()) <= sp.train_end
    assert set(taught.vm.tolist()) <= parts[0]
    tuned = hourly(sp.calibration, sp.train_end, sp.calibration_end, 12, 1)
    assert sp.train_end <= int(tuned.cut.min())
    assert int((tuned.cut + tuned.gap + tuned.horizon).max()) <= sp.calibration_end
    asked = hourly(sp.test, sp.calibration_end, sp.end, 12, 1)
    assert sp.calibration_end <= int(asked.cut.min())
    assert int((asked.cut + asked.gap + asked.horizon).max()) <= sp.end
    # A VM stays in its part when others come or go.
    fewer = split(series.take(list(range(0, 60, 2))), (60, 20, 20), (60, 80))
    assert {series.vms[i] for i in sp.test if i % 2 == 0} == {series.vms[2 * i] for i in fewer.test}
    with pytest.raises(UsageError):
        split(fleet(60, 1, resources=("cpu",)), (60, 20, 20), (60, 80))
