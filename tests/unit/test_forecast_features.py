"""Features: no look-ahead, free of scale, the same alone and among others, and safe with gaps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvctl.errors import UsageError
from hvctl.forecasting.blocks import summarise
from hvctl.forecasting.features import FEATURES, feature_hash, features
from hvctl.forecasting.rules import rules
from hvctl.forecasting.series import RESOURCES, Cases, Series, outcomes
from unit.fleets import fleet

FLEET = fleet()
NAN = np.float32(np.nan)


def cases(*lines: tuple[int, int, int, int, int]) -> Cases:
    return Cases(*(np.array(column) for column in zip(*lines, strict=True)))


MANY = cases(
    *(
        (v, c, g, h, b)
        for v in range(6)
        for c in (300, 2030, 2301)
        for g, h in ((0, 12), (48, 6))
        for b in (12, 288, 2016)
    )
)


@settings(max_examples=25, deadline=None)
@given(
    cut=st.integers(12, 2300), gap=st.sampled_from((0, 6, 48)), horizon=st.sampled_from((6, 12)), seed=st.integers(0, 9)
)
def test_the_future_changes_no_feature_and_no_rule(cut: int, gap: int, horizon: int, seed: int) -> None:
    # The third question is later, so that what the others may not see is at hand.
    later = cut + 6 * 24
    asked = cases((0, cut, gap, horizon, 2016), (5, cut, gap, horizon, 72), (1, later, gap, horizon, 2016))
    values = FLEET.values["cpu"].copy()
    random = np.random.default_rng(seed)
    for vm, first in ((0, cut), (5, cut), (1, later)):
        values[vm, first:] = random.uniform(0, 50, values[vm, first:].shape)
    other = replace(FLEET, values={**FLEET.values, "cpu": values})
    for a, b in ((FLEET, other), (FLEET, FLEET.until(later))):
        np.testing.assert_array_equal(features(a, "cpu", asked).x, features(b, "cpu", asked).x)
        one, two = rules(a, "cpu", asked, peak=True), rules(b, "cpu", asked, peak=True)
        assert all(np.array_equal(one[name], two[name]) for name in one)


def test_the_last_slot_before_the_cut_is_seen() -> None:
    values = FLEET.values["cpu"].copy()
    values[0, 2000 - 1] *= 3
    asked = cases((0, 2000, 0, 12, 2016))
    changed = features(replace(FLEET, values={**FLEET.values, "cpu": values}), "cpu", asked)
    assert changed.x[0, FEATURES.index("last")] != features(FLEET, "cpu", asked).x[0, FEATURES.index("last")]


def test_what_is_older_than_the_history_is_not_seen() -> None:
    values = FLEET.values["cpu"].copy()
    values[:, : 2400 - 72] = 77
    other = replace(FLEET, values={**FLEET.values, "cpu": values})
    asked = cases((0, 2400, 0, 12, 72), (1, 2400, 6, 6, 12))
    np.testing.assert_array_equal(features(FLEET, "cpu", asked).x, features(other, "cpu", asked).x)
    one, two = rules(FLEET, "cpu", asked, peak=False), rules(other, "cpu", asked, peak=False)
    assert all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("resource", RESOURCES)
def test_features_are_free_of_scale(resource: str) -> None:
    factor = np.float32(64)
    big = replace(
        FLEET,
        values={n: v * 1000 for n, v in FLEET.values.items()},
        sizes={n: v * 1000 for n, v in FLEET.sizes.items()},
    )
    bigger = replace(
        big,
        values={n: v * factor for n, v in big.values.items()},
        sizes={n: v * factor for n, v in big.sizes.items()},
    )
    np.testing.assert_allclose(features(big, resource, MANY).x, features(bigger, resource, MANY).x, atol=2e-3)


def test_alone_and_among_others_is_the_same() -> None:
    together = features(FLEET, "disk", MANY)
    for row in range(0, len(MANY), 5):
        alone = features(FLEET, "disk", MANY.take(np.array([row])))
        np.testing.assert_allclose(alone.x[0], together.x[row], rtol=1e-4, atol=1e-5)
        one = FLEET.take([int(MANY.vm[row])])
        asked = replace(MANY.take(np.array([row])), vm=np.array([0]))
        np.testing.assert_allclose(features(one, "disk", asked).x[0], together.x[row], rtol=1e-4, atol=1e-5)


def test_serving_is_training_at_the_last_slot() -> None:
    """A daemon keeps a week; the trace holds more."""
    cut = 2300
    now = Series(
        FLEET.vms, FLEET.start + (cut - 2016) * 300, {n: v[:, cut - 2016 : cut] for n, v in FLEET.values.items()}
    )
    served = features(replace(now, sizes=FLEET.sizes), "network", Cases.now(6, 2016, 0, 12, 2016))
    trained = features(FLEET, "network", Cases.now(6, cut, 0, 12, 2016))
    np.testing.assert_allclose(served.x, trained.x, rtol=1e-4, atol=1e-5)


def test_gaps_give_nan_and_never_infinity() -> None:
    values = FLEET.values["cpu"].copy()
    values[0, :] = NAN
    values[1, 2000:2050] = NAN
    values[2, ::2] = NAN
    holed = replace(FLEET, values={**FLEET.values, "cpu": values})
    asked = cases((0, 2050, 0, 12, 2016), (1, 2050, 0, 12, 2016), (2, 2050, 0, 12, 12))
    made = features(holed, "cpu", asked)
    assert not np.isinf(made.x).any()
    assert np.isfinite(made.base).all()
    assert np.isnan(made.x[1, FEATURES.index("last")])
    assert np.isfinite(made.x[1, FEATURES.index("max_336")])
    assert all(np.isfinite(v).all() for v in rules(holed, "cpu", asked, peak=True).values())


def test_after_a_gap_of_more_than_a_day_yesterday_is_not_the_same_clock_window() -> None:
    made = features(FLEET, "cpu", cases((0, 2500, 288, 12, 2016)))
    assert np.isnan(made.x[0, FEATURES.index("clock_peak_1")])
    assert np.isfinite(made.x[0, FEATURES.index("clock_peak_2")])


def test_a_target_comes_back_from_its_ratio() -> None:
    made = features(FLEET, "memory", MANY)
    peak, mean = outcomes(FLEET, "memory", MANY)
    known = np.isfinite(peak)
    assert known.any()
    np.testing.assert_allclose(made.value(made.ratio(peak))[known], peak[known], rtol=1e-4)
    assert (mean[known] <= peak[known] * (1 + 1e-6)).all()


def test_an_outcome_beyond_the_series_or_half_measured_is_none() -> None:
    values = FLEET.values["cpu"].copy()
    values[0, 1000:1006] = NAN
    holed = replace(FLEET, values={**FLEET.values, "cpu": values})
    peak, _ = outcomes(holed, "cpu", cases((0, 998, 0, 12, 12), (0, 994, 0, 6, 12), (1, FLEET.slots - 5, 0, 6, 12)))
    assert np.isnan(peak).tolist() == [True, False, True]


def test_half_hours_hold_peak_and_mean() -> None:
    values = np.array([[9, 1, 2, 3, 4, 5, 6, NAN, NAN, NAN, NAN, NAN, 8]], np.float32)
    peaks, means = summarise(values, 1)
    assert peaks.tolist() == [[6.0, 8.0]]
    assert means.tolist() == [[3.5, 8.0]]


def test_the_list_of_features_is_what_models_were_trained_on() -> None:
    """Whoever changes the list trains the shipped models again, and then this digest."""
    assert len(set(FEATURES)) == len(FEATURES) == 71
    assert feature_hash() == "665e643a886b6c67725f21ed0714ca2c15bd6d388eb6a16f0e69e4baee3188c4"


def test_a_series_says_what_it_is_not() -> None:
    with pytest.raises(UsageError):
        replace(FLEET, step=60)
    with pytest.raises(UsageError):
        replace(FLEET, values={"cpu": FLEET.values["cpu"].astype(np.float64)})
    with pytest.raises(UsageError):
        replace(FLEET, values={"cpu": FLEET.values["cpu"], "disk": FLEET.values["disk"][:, :5]})
