"""The node's record of restarts: each start is learned from once, and nothing is read of those that are known."""

from __future__ import annotations

from typing import Any

import pytest
from faults.command import FakeSite

from hvctl.engine.operate import Engine
from hvctl.model.sample import EventKind, Sample, VmEvent
from hvctl.operations.restarts import LOOKED_BACK, learn

NOW = 1_800_000_000


def started(engine: Engine, site: FakeSite, at: int, *cpu: float) -> str:
    """A VM that was started `at` seconds before NOW, with a sample each ten seconds since."""
    site.world.add_vm("a")
    uuid = site.world.vm("a").uuid
    samples = [Sample(uuid, "a", NOW - at + 10 * (n + 1), 10.0, cpu=c) for n, c in enumerate(cpu)]
    engine.store.samples.add(engine.facts.name, samples, [VmEvent(uuid, "a", EventKind.START, NOW - at)])
    return uuid


def spans(engine: Engine) -> list[tuple[int, float]]:
    return [(r.span, r.peak["cpu"]) for r in engine.store.restarts.of(engine.facts.name)]


def test_a_span_is_learned_when_it_is_over_and_once(
    engine: Engine, site: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(engine, site, 60, 3.0, 1.0, 1.0, 4.0, 1.0, 1.0)
    assert learn(engine, NOW, (30, 60, 90)) == "2 spans after starts of 1 VMs"
    assert sorted(spans(engine)) == [(30, 3.0), (60, 4.0)]

    def read(*_: Any) -> Any:
        raise AssertionError("samples are read of a start of which all is known")

    with monkeypatch.context() as patch:
        patch.setattr(engine.store.samples, "latest", read)
        assert learn(engine, NOW + 20, (30, 60, 90)) == "nothing new of 1 starts"
    assert len(spans(engine)) == 2


def test_a_start_of_long_ago_is_left(engine: Engine, site: FakeSite) -> None:
    started(engine, site, int(LOOKED_BACK) + 10, *[1.0] * 6)
    assert learn(engine, NOW, (60,)) == "nothing new of 0 starts"
    assert spans(engine) == []
