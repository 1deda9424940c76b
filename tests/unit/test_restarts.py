"""The need after a restart: learned from the VM's own restarts, then from others', and never from what is to come."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvctl.decide.restarts import OF_FLEET, OF_IMAGE, OWN, need_after_restart, pinball
from hvctl.model.restart import Restart

PEAKS = st.lists(st.floats(0, 1e6), min_size=OWN, max_size=30)


def restarts(
    peaks: Sequence[float], vm: str = "a", image: str | None = "micro", before: Sequence[float] = ()
) -> list[Restart]:
    forecasts = [{"cpu": r} for r in before] or [{} for _ in peaks]
    return [
        Restart(vm, image, 1000.0 * n, 60.0, 300, {"cpu": peak}, before=forecast)
        for n, (peak, forecast) in enumerate(zip(peaks, forecasts, strict=True))
    ]


def need(record: Sequence[Restart], vm: str = "a", image: str | None = "micro", **options: float) -> float | None:
    found = need_after_restart(vm, image, record, "cpu", **options)
    return None if found is None else found.value


@given(PEAKS, st.randoms())
def test_the_order_of_the_record_does_not_matter(peaks: list[float], chance: random.Random) -> None:
    record = restarts(peaks)
    mixed = list(record)
    chance.shuffle(mixed)
    assert need_after_restart("a", "micro", record, "cpu") == need_after_restart("a", "micro", mixed, "cpu")


@given(PEAKS, st.floats(0, 1e6))
def test_a_vm_never_needs_more_than_its_size_nor_less_than_nothing(peaks: list[float], size: float) -> None:
    value = need(restarts(peaks), limit=size)
    assert value is not None
    assert 0 <= value <= size


@given(st.floats(1e-3, 1e6))
def test_what_is_always_the_same_is_predicted_without_a_margin(peak: float) -> None:
    assert need(restarts([peak] * 5)) == pytest.approx(peak)


def test_the_vms_own_restarts_come_before_its_images_and_those_before_the_fleets() -> None:
    own = restarts([1.0] * OWN)
    of_image = restarts([2.0] * OF_IMAGE, "b")
    of_fleet = restarts([3.0] * OF_FLEET, "c", "debian")
    assert need(own + of_image + of_fleet) == pytest.approx(1.0)
    found = need_after_restart("a", "micro", own[1:] + restarts([1.0] * OF_IMAGE, "b") + of_fleet, "cpu")
    assert found is not None
    assert (found.learned_from, found.value) == ("its image", pytest.approx(1.0))
    found = need_after_restart("a", "micro", of_image[1:] + of_fleet, "cpu")
    assert found is not None
    assert found.learned_from == "the fleet"
    assert need(own[1:] + of_image[: OF_IMAGE - OWN] + of_fleet[:1]) is None


def test_without_an_image_nobody_shares_it() -> None:
    assert need(restarts([2.0] * OF_IMAGE, "b", None), "a", None) is None


def test_a_resource_that_was_not_measured_is_not_made_up() -> None:
    assert need_after_restart("a", "micro", restarts([1.0] * 9), "memory") is None


def test_a_boot_storm_is_told_from_what_the_hour_before_says() -> None:
    """The storm is a multiple of the load, which changes: neither the load nor the last storm alone tells it."""
    chance = random.Random(7)
    loads = [chance.uniform(0.2, 4.0) for _ in range(21)]
    peaks = [load * chance.uniform(4.5, 5.5) for load in loads]
    found = need_after_restart("a", "micro", restarts(peaks[:20], before=loads[:20]), "cpu", before=loads[20])
    assert found is not None
    assert "ratio" in found.rule
    assert peaks[20] <= found.value * 1.02
    assert found.value < 6.7 * loads[20]


@pytest.mark.parametrize("seed", range(5))
def test_it_loses_less_than_the_last_value(seed: int) -> None:
    chance = random.Random(seed)
    peaks = [chance.lognormvariate(0, 0.3) for _ in range(60)]
    losses, naive = [], []
    for n in range(20, len(peaks)):
        value = need(restarts(peaks[:n]))
        assert value is not None
        losses.append(pinball(peaks[n], value, 0.95))
        naive.append(pinball(peaks[n], peaks[n - 1], 0.95))
    assert sum(losses) < sum(naive)


def test_pinball_weighs_what_is_missing() -> None:
    assert pinball(3.0, 1.0, 0.95) == pytest.approx(1.9)
    assert pinball(1.0, 3.0, 0.95) == pytest.approx(0.1)
