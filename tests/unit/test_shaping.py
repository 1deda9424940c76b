"""The numbers and marks that hvctl writes into traffic control."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hvctl.adapters.network.shaping import MAX_RATE, MIN_RATE, Mark, bucket, ifb_name
from hvctl.errors import RefusedError

rates = st.integers(MIN_RATE // 8, MAX_RATE // 8).map(lambda n: n * 8)
mtus = st.integers(68, 65521)
# What the kernel takes as a device's name.
taps = st.text(st.characters(codec="ascii", exclude_characters="/:", min_codepoint=33), min_size=1, max_size=15)


@given(rate=rates, mtu=mtus)
def test_a_bucket_holds_a_frame_and_a_tick_and_its_queue_what_the_bucket_holds(rate: int, mtu: int) -> None:
    wanted = bucket(rate, mtu)
    assert wanted.rate * 8 == rate
    assert wanted.burst > mtu + 18
    assert wanted.burst >= wanted.rate // 100
    assert wanted.queue >= wanted.burst
    assert wanted.queue < 2**32


@given(rate=rates, other=rates, mtu=mtus)
def test_only_a_deeper_bucket_takes_the_place_of_one(rate: int, other: int, mtu: int) -> None:
    assume(rate <= other)
    small, large = bucket(rate, mtu), bucket(other, mtu)
    assert not small.fits_over(large)
    assert not small.fits_over(small)
    if other - rate > rate // 100 + 8000:
        assert large.fits_over(small)


@pytest.mark.parametrize("rate", [-8, 0, MIN_RATE - 8, MIN_RATE + 1, MAX_RATE + 8])
def test_a_rate_outside_of_what_the_kernel_counts_in_is_refused_with_a_way_out(rate: int) -> None:
    with pytest.raises(RefusedError) as refused:
        bucket(rate, 1500)
    assert refused.value.hint


@given(st.sets(taps, min_size=2, max_size=20))
def test_each_tap_has_an_ifb_name_of_its_own_that_the_kernel_takes(names: set[str]) -> None:
    ifbs = {ifb_name(n) for n in names}
    assert len(ifbs) == len(names)
    assert all(len(n) <= 15 for n in ifbs)


@given(owner=st.uuids().map(str), tap=taps, default=st.sampled_from(["", "noqueue"]))
def test_a_mark_reads_back(owner: str, tap: str, default: str) -> None:
    mark = Mark(owner, tap, default)
    assert Mark.parse(mark.alias) == mark
    assert len(mark.alias) < 256


@pytest.mark.parametrize("alias", ["hvctl", "hvctl:x", "hvctl:a:b:c:d", "nova:a:b", "a port of mine"])
def test_somebody_elses_alias_is_no_mark(alias: str) -> None:
    assert Mark.parse(alias) is None
