"""The jobs that forecast and retrain: what is kept, what came, who has won, and who reads it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.command import FakeSite

from hvctl.adapters.models import modelstore
from hvctl.adapters.models.boosters import Silence
from hvctl.decide.needs import Known, expected_need, of_span
from hvctl.engine.collect import Collector
from hvctl.engine.expected import Expected, newest
from hvctl.engine.operate import Engine
from hvctl.engine.runtime import open_engine
from hvctl.errors import RefusedError
from hvctl.forecasting import arbiter, margin
from hvctl.forecasting.arbiter import Standing
from hvctl.forecasting.forecast import forecast
from hvctl.forecasting.panel import Ask, Panel
from hvctl.forecasting.rounds import Lessons
from hvctl.forecasting.series import F32, STEP, Series
from hvctl.jobs.catalog import JOBS, Node, perform
from hvctl.model.allocation import Allocation, Record, Resources
from hvctl.model.forecast import Answerer, ModelCard
from hvctl.model.job import RunState
from hvctl.model.pool import Rung
from hvctl.model.prediction import FleetMargin, Prediction, Recorded, VmMargin
from hvctl.model.restart import Restart
from hvctl.model.sample import EventKind, Sample, VmEvent
from hvctl.operations import compare, interrupt, recent
from hvctl.operations import forecast as forecasts
from hvctl.operations import model as models
from hvctl.operations import pool as pools
from hvctl.operations import refresh as refreshing
from hvctl.operations import retrain as training
from hvctl.operations.compare import HORIZON
from hvctl.operations.recent import OVERLAP, WHOLE, Recent
from hvctl.operations.retrain import retrain
from hvctl.operations.series import WEEK, history
from hvctl.operations.top import Resource, Top, Use, kept_forecasts
from unit.commandline import Run, runner
from unit.fleets import fleet
from unit.poolhost import MIB, add
from unit.record import NOW, put
from unit.vms import vm_with

END = int(NOW) // STEP * STEP
OWN_RATE, FLEET_RATE = 0.05, 0.2
WON = {"cpu-peak": Standing(model=True)}


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What hvctl is shipped with is another test's matter."""
    monkeypatch.setattr(modelstore, "shipped_folder", lambda: tmp_path / "shipped")


@pytest.fixture
def run(site: FakeSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(site, monkeypatch, capsys)


@dataclass
class Oracle:
    """A model that always says the same ratio to the base."""

    ratio: float = 0.0
    targets: tuple[str, ...] = ("peak",)

    def within(self, seconds: float) -> Ask:
        return self.say

    def say(self, key: str, x: F32) -> F32 | Silence:
        known = key.split("-")[1] in self.targets
        return np.full(len(x), self.ratio, np.float32) if known else Silence("no part")


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Oracle:
    """In use instead of the models of the state directory."""
    said = Oracle()
    rates = {"model-cpu-peak": (OWN_RATE, FLEET_RATE)}
    known = Panel(models=said, missing="", name="m1", age=1.0, rates=rates)
    monkeypatch.setattr(models, "panel", lambda _settings: known)
    return said


def refresh(engine: Engine) -> str:
    return refreshing.refresh(engine, history(engine))


def kept(engine: Engine) -> dict[tuple[str, str], Prediction]:
    found = engine.store.forecasts.newest(engine.facts.name, 0, 2**40)
    return {(p.vm_uuid, p.resource): p for p in found}


# --- the job


def test_nothing_is_forecast_of_nothing(engine: Engine) -> None:
    engine.clock = lambda: NOW
    assert refresh(engine) == "nothing was measured yet"


def test_every_vm_that_is_measured_is_forecast(engine: Engine) -> None:
    made = fleet(3, 1)
    made.values["memory"][1] = np.nan  # its guest does not report
    for values in made.values.values():
        values[2, -12:] = np.nan  # off for an hour
    put(engine, made)
    assert refresh(engine).startswith("2 VMs forecast, 0 of 7 answers by the model")
    found = kept(engine)
    assert {vm for vm, _ in found} == {"vm-0", "vm-1"}
    assert ("vm-1", "memory") not in found
    one = found["vm-0", "cpu"]
    told = forecasts.forecast_vm(engine, "vm-0", forecasts.Question())
    assert (one.made_at, one.horizon, one.quantile) == (END, 3600, 0.95)
    assert (one.peak, one.mean, one.rule) == (told.lines[0].peak, told.lines[0].mean, told.lines[0].rule)
    assert (one.rule_peak, one.model_peak, one.actual_peak) == (one.peak, None, None)
    again = kept(engine)
    refresh(engine)
    assert kept(engine) == again


def refresh_at(engine: Engine, *slots: int) -> None:
    """So many slots before the end of the record, of which nothing later is there for it."""
    for before in slots:
        engine.clock = lambda at=NOW - STEP * before: at  # type: ignore[misc]
        refresh(engine)


def test_what_came_is_filled_in_when_the_hour_is_over(engine: Engine) -> None:
    whole = fleet(2, 1.5)
    whole.values["cpu"][1, -12:-3] = np.nan  # off for most of that hour
    put(engine, whole)
    refresh_at(engine, 12, 1)
    host = engine.facts.name
    assert {p.actual_peak for p in engine.store.forecasts.made(host, 0, NOW)} == {None}
    refresh_at(engine, 0)
    past = {(p.vm_uuid, p.resource): p for p in engine.store.forecasts.made(host, 0, END - HORIZON)}
    for vm, resource, values in (("vm-0", "cpu", whole.values["cpu"][0]), ("vm-1", "disk", whole.values["disk"][1])):
        assert past[vm, resource].actual_peak == pytest.approx(float(values[-12:].max()), rel=1e-4)
        assert past[vm, resource].actual_mean == pytest.approx(float(values[-12:].mean()), rel=1e-4)
    assert past["vm-1", "cpu"].actual_peak is past["vm-1", "cpu"].actual_mean is None


def test_the_model_answers_only_where_it_has_won(
    engine: Engine, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arbiter, "MIN_CASES", 6)
    monkeypatch.setattr(arbiter, "MIN_VMS", 3)
    whole = fleet(3, 1)
    # CPU is what it always is, which the model says exactly and the rule says a quarter too high.
    whole.values["cpu"][:] = 2.0
    put(engine, whole)
    refresh_at(engine, 60)
    one = kept(engine)["vm-0", "cpu"]
    assert (one.model_peak, one.rule_peak) == (pytest.approx(2.0, rel=1e-3), pytest.approx(2.5, rel=1e-2))
    assert one.answered == Answerer.BASELINE
    refresh_at(engine, 48)
    assert kept(engine)["vm-0", "cpu"].answered == Answerer.BASELINE
    refresh_at(engine, 36)
    record = engine.store.forecasts.standings(engine.facts.name)["cpu", "peak"]
    assert (record.cases, record.vms, record.model) == (6, 3, True)
    assert record.model_loss < record.rule_loss
    one = kept(engine)["vm-0", "cpu"]
    assert (one.answered, one.rule, one.peak) == (Answerer.MODEL, "m1", one.model_peak)
    # A model that says too little in the next hours loses what it won.
    oracle.ratio = -3.0
    refresh_at(engine, 24, 12, 0)
    assert not engine.store.forecasts.standings(engine.facts.name)["cpu", "peak"].model
    assert kept(engine)["vm-0", "cpu"].answered == Answerer.BASELINE


def test_means_are_compared_and_won_as_peaks_are(
    engine: Engine, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arbiter, "MIN_CASES", 3)
    monkeypatch.setattr(arbiter, "MIN_VMS", 3)
    oracle.targets = ("mean",)
    whole = fleet(3, 1, resources=("cpu",))
    whole.values["cpu"][:] = 2.0
    put(engine, whole)
    refresh_at(engine, 36)
    one = kept(engine)["vm-0", "cpu"]
    assert (one.model_peak, one.model_mean) == (None, pytest.approx(2.0, rel=1e-3))
    assert one.mean == one.rule_mean == pytest.approx(2.5, rel=1e-2)
    refresh_at(engine, 24)
    found = engine.store.forecasts.standings(engine.facts.name)
    assert set(found) == {("cpu", "mean")}
    assert found["cpu", "mean"].model
    one = kept(engine)["vm-0", "cpu"]
    assert (one.peak, one.mean, one.answered) == (one.rule_peak, one.model_mean, Answerer.BASELINE)
    engine.clock = lambda: NOW - STEP * 24
    (line,) = (f for f in forecasts.forecast_vm(engine, "vm-0", forecasts.Question()).lines if f.resource == "cpu")
    assert (line.answered, line.mean_answered, line.mean_rule) == (Answerer.BASELINE, Answerer.MODEL, "m1")
    assert line.mean == one.mean


# --- margins


def growing(hours: int) -> Series:
    """Demand that is 1 for a day, and then doubles with every hour."""
    made = fleet(3, 1 + hours / 24, resources=("cpu",))
    steps = 2.0 ** (1 + np.arange(hours))
    made.values["cpu"][:] = np.concatenate([np.ones(288), np.repeat(steps, 12)]).astype(np.float32)
    return replace(made, sizes={"cpu": np.full(3, 1e9, np.float32), "memory": np.full(3, 1e9, np.float32)})


def test_margins_are_kept_between_rounds_and_follow_what_came(engine: Engine, oracle: Oracle, run: Run) -> None:
    host = engine.facts.name
    put(engine, growing(8))
    refresh_at(engine, 96, 84)
    first = {f.answered: f for f in engine.store.forecasts.fleet_margins(host, "m1") if f.target == "peak"}
    assert set(first) == {"model", "baseline"}
    # Three VMs of fifty were missed, once; the model's margin follows as fast as its card says.
    step = FLEET_RATE * 3 / margin.FLEET * 0.95
    assert first["model"].level == pytest.approx(step)
    assert (first["model"].cases, first["model"].covered) == (3, 0)
    # Nothing is learned twice, and an engine that starts anew goes on from there.
    refresh_at(engine, 84)
    assert engine.store.forecasts.fleet_margins(host, "m1")[0].cases == 3
    before = kept(engine)["vm-0", "cpu"]
    refresh_at(engine, 72, 60)
    levels = {f.answered: f for f in engine.store.forecasts.fleet_margins(host, "m1") if f.target == "peak"}
    assert levels["model"].level == pytest.approx(3 * step)
    (own,) = (
        m
        for m in engine.store.forecasts.vm_margins(host, "m1", ["vm-0"])
        if (m.answered, m.target) == ("model", "peak")
    )
    assert (own.level, own.seen) == (pytest.approx(3 * OWN_RATE * 0.95), 3)
    after = kept(engine)["vm-0", "cpu"]
    # The oracle says the base, so that what it says grows with the demand, and its margin with the misses.
    assert before.model_peak is not None
    assert after.model_peak is not None
    ratio = after.model_peak / before.model_peak
    plain = forecast_ratio(engine, 60, 84)
    assert ratio == pytest.approx(plain * np.exp(2 * step), rel=0.01)
    # So has the rule's, at the usual rate.
    said = forecast(history(engine, ["vm-0"]), Panel(), resources=["cpu"])[1].peak
    usual = margin.FLEET_RATE * 3 / margin.FLEET * 0.95
    assert after.rule_peak == pytest.approx(said * np.exp(3 * usual), rel=0.01)
    refresh_at(engine, 48, 36, 24, 12, 0)
    engine.store.forecasts.learn(host, [Recorded("cpu", "peak", "m1", 1.0, 2.0, 900, 50, True, 0)], [], [])
    drifts = {(d.target, d.answered): d for d in compare.drift(engine, forecasts.panel_of(engine, ()))}
    one = drifts["peak", "model"]
    assert (one.answering, one.stated, one.observed, one.cases) == (True, 0.95, 0.0, 24)
    assert one.margin == pytest.approx(np.exp(8 * step))
    assert not drifts["peak", "baseline"].answering
    shown = json.loads(run("-f", "json", "model", "drift").out)["drift"][0]
    assert (shown["answered"], shown["answering"], shown["margin"]) == ("model", True, one.margin)
    assert "95.0 %" in run("model", "drift").out


def forecast_ratio(engine: Engine, later: int, earlier: int) -> float:
    """By which factor the oracle's plain word grew between two times, so many slots before the end."""
    series = history(engine, ["vm-0"], until=NOW)
    words = [
        forecast(series.until(series.slots - before), Panel(models=Oracle(), standings=WON), resources=["cpu"])[1].peak
        for before in (later, earlier)
    ]
    return words[0] / words[1]


def test_margins_of_another_model_and_of_vms_long_gone(engine: Engine, oracle: Oracle) -> None:
    host = engine.facts.name
    old = FleetMargin("m0", "model", "cpu", "peak", 2.0, 900, 100.0, 50.0, END - 3600)
    gone = VmMargin("m1", "model", "cpu", "peak", "vm-9", 2.0, 30, END - 8 * 86400)
    engine.store.forecasts.learn(host, [], [old], [gone])
    put(engine, fleet(2, 1, resources=("cpu",)))
    refresh_at(engine, 0)
    assert kept(engine)["vm-0", "cpu"].model_peak == pytest.approx(
        forecast(history(engine, ["vm-0"]), Panel(models=oracle, standings=WON), resources=["cpu"])[1].peak
    )
    assert engine.store.forecasts.fleet_margins(host, "m0") == [old]
    assert engine.store.forecasts.vm_margins(host, "m1") == []


def test_the_record_states_the_coverage_once_it_is_long(engine: Engine, oracle: Oracle) -> None:
    put(engine, fleet(1, 1, resources=("cpu",)))
    host = engine.facts.name
    for cases, stated in ((arbiter.MIN_CASES - 1, None), (arbiter.MIN_CASES, 0.75)):
        record = FleetMargin("m1", "baseline", "cpu", "peak", 0.0, cases, 200.0, 150.0, END)
        engine.store.forecasts.learn(host, [], [record], [])
        line = forecasts.forecast_vm(engine, "vm-0", forecasts.Question()).lines[0]
        assert line.coverage == stated


def test_another_model_begins_anew(engine: Engine, oracle: Oracle) -> None:
    host = engine.facts.name
    engine.store.forecasts.learn(host, [Recorded("cpu", "peak", "m0", 1.0, 9.0, 9000, 90, True, 0)], [], [])
    put(engine, fleet(2, 1))
    refresh_at(engine, 12, 0)
    record = engine.store.forecasts.standings(host)["cpu", "peak"]
    assert (record.model_name, record.cases, record.model) == ("m1", 2, False)


def test_hours_that_overlap_teach_once(engine: Engine, oracle: Oracle) -> None:
    put(engine, fleet(2, 1))
    # The hours of the first five are over in the end, and the fifth begins where the first one ended.
    refresh_at(engine, 24, 21, 18, 15, 12, 9, 6, 3, 0)
    assert engine.store.forecasts.standings(engine.facts.name)["cpu", "peak"].cases == 2 * 2
    refresh_at(engine, 0)
    assert engine.store.forecasts.standings(engine.facts.name)["cpu", "peak"].cases == 2 * 2


def test_hours_that_overlap_teach_once_whoever_asks() -> None:
    """As a replay does, which keeps no record between its rounds."""

    def said(at: int) -> list[Prediction]:
        one = Prediction(at, "", "cpu", 3600, 0.95, 1.0, 1.0, "r", "baseline", "m1", 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 0.5)
        return [one._replace(vm_uuid=f"vm-{i}") for i in range(4)]

    lessons = Lessons(Panel(name="m1"))
    assert [lessons.learn(said(at)) for at in (0, 300, 3300, 3600, 6900)] == [4, 0, 0, 4, 0]
    assert {(f.target, f.cases) for f in lessons.fleet()} == {("peak", 8), ("mean", 8)}
    assert {s.cases for s in lessons.standings().values()} == {8}


def test_old_forecasts_go(engine: Engine) -> None:
    host = engine.facts.name
    put(engine, fleet(1, 0.2))
    old = Prediction(END - 90000, "vm-0", "cpu", 3600, 0.95, 1.0, 1.0, "r", "baseline", None, None, 1.0, 1.0)
    engine.store.forecasts.add(host, [old, old._replace(made_at=END - 80000)])
    refresh(engine)
    assert {p.made_at for p in engine.store.forecasts.made(host, 0, NOW)} == {END - 80000, END}


# --- the week in memory


def same(one: Series, other: Series) -> None:
    assert (one.vms, one.start, one.slots) == (other.vms, other.start, other.slots)
    for resource, values in other.values.items():
        np.testing.assert_array_equal(one.values[resource], values)
        np.testing.assert_array_equal(one.size(resource), other.size(resource))
    assert one.starts is not None
    assert other.starts is not None
    np.testing.assert_array_equal(one.starts, other.starts)


def test_the_week_in_memory_is_the_record(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def counted(engine: Engine, uuids: Any = None, seconds: float = WEEK, until: float | None = None) -> Series:
        asked.append(seconds)
        return history(engine, uuids, seconds, until)

    monkeypatch.setattr(recent, "history", counted)
    whole = fleet(4, 0.5)
    whole.values["memory"][1] = np.nan
    store = engine.store.samples
    memory = Recent()

    def until(slots: int, vms: list[int]) -> None:
        """What is written by then: all rows of these VMs up to so many slots before the end, some again."""
        part = whole.take(vms).until(whole.slots - slots)
        put(engine, part, end=NOW - STEP * slots)
        same(memory.series(engine), history(engine))

    until(14, [0, 1])
    until(13, [0, 1])
    # One of them is behind by some slots, and so are two that are new.
    until(9, [0])
    until(8, [0, 1, 2, 3])
    for before in (5, 3):
        event = VmEvent("vm-2", "c", EventKind.RESTART, NOW - STEP * before - 30, "", None)
        store.add(engine.facts.name, [], [event])
        until(before, [0, 1, 2, 3])
    assert asked == [WEEK, *[OVERLAP + STEP * n for n in (1, 4, 1)], WEEK, *[OVERLAP + STEP * n for n in (3, 2)]]
    # All are off, for an hour and more: everything is read again by then.
    for hours in (0.5, 1.5):
        engine.clock = lambda at=NOW + 3600 * hours: at  # type: ignore[misc]
        same(memory.series(engine), history(engine))
    assert asked[-1] == WEEK
    assert WHOLE == 3600


# --- who reads them


def predicted(engine: Engine, uuid: str, made_at: int, answered: str = "baseline", **peaks: float) -> None:
    engine.store.forecasts.add(
        engine.facts.name,
        [
            Prediction(made_at, uuid, resource, 3600, 0.95, peak, peak / 2, "max_1h", answered, None, None, peak, 1.0)
            for resource, peak in peaks.items()
        ],
    )


@pytest.fixture
def served(site: FakeSite) -> Iterator[Engine]:
    """As every command opens it; the clock stands."""
    with open_engine(replace(site.settings, reserve_memory=0, cpu_overcommit=1.0)) as engine:
        engine.clock = lambda: NOW
        yield engine


def test_a_need_is_what_is_forecast_with_its_reason(site: FakeSite, served: Engine) -> None:
    uuid = add(site, "a", memory=512, vcpus=2)
    vm = served.host.domains.get("a")
    assert served.needs(vm, 0.0).reason == "promised: no forecast"
    served.needs = Expected(served)
    predicted(served, uuid, END, cpu=0.7312, memory=100.2)
    need = served.needs(vm, 0.0)
    balloon = served.host.domains.balloon(uuid)
    kernel = 0 if balloon.total is None else balloon.actual - balloon.total
    whole = 101 * MIB + kernel + served.settings.memory_margin
    assert (need.resources, need.known) == (Resources(cpu=74, memory=whole), True)
    assert "cpu by max_1h; memory by max_1h" in need.reason
    assert "quantile 0.95" in need.reason


def test_a_part_that_nobody_forecasts_is_what_is_promised(site: FakeSite, served: Engine) -> None:
    uuid = add(site, "a", memory=512, vcpus=2)
    vm = served.host.domains.get("a")
    predicted(served, uuid, END, cpu=0.5)
    predicted(served, uuid, END, answered=Answerer.TOO_LITTLE_HISTORY.value, memory=1.0)
    assert served.needs(vm, 0.0).resources == Resources(cpu=50, memory=512 * MIB)


def test_an_old_forecast_is_none(site: FakeSite, served: Engine) -> None:
    uuid = add(site, "a")
    predicted(served, uuid, END - 4000, cpu=0.5)
    assert newest(served) == {}
    assert not served.needs(served.host.domains.get("a"), 0.0).known


def test_after_an_interruption_restarts_count(site: FakeSite, served: Engine) -> None:
    uuid = add(site, "a", vcpus=4)
    vm = served.host.domains.get("a")
    record = [Restart(uuid, None, 1000.0 * i, 60.0, 300, {"cpu": 3.0}) for i in range(1, 4)]
    served.store.restarts.add(served.facts.name, record)
    predicted(served, uuid, END, cpu=0.5, memory=50.0)
    assert served.needs(vm, 0.0).resources.cpu == 50
    need = served.needs(vm, 1800.0)
    assert need.resources.cpu == 300
    assert "from 3 restarts of this VM" in need.reason
    served.store.restarts.add(
        served.facts.name, [Restart(uuid, None, 9e3 + i, 1.0, 300, {"cpu": 99}) for i in range(40)]
    )
    served.needs = Expected(served)
    assert served.needs(vm, 1800.0).resources.cpu == 100 * vm.max_vcpus


def test_memory_that_the_guests_kernel_holds_is_needed_beside_what_is_measured() -> None:
    vm = vm_with(Allocation(1, 512 * MIB))
    said = Prediction(END, vm.uuid, "memory", 3600, 0.95, 50.0, 50.0, "r", "baseline", None, None, 50.0, 1.0)
    need = expected_need(vm, Known({"memory": said}, margin=10 * MIB, kernel=7 * MIB), 0.0)
    assert need.resources.memory == (50 + 7 + 10) * MIB


def test_restarts_that_took_little_make_no_need_smaller(site: FakeSite, served: Engine) -> None:
    """Its start is only the beginning of the hour that is forecast."""
    uuid = add(site, "a", vcpus=4)
    record = [Restart(uuid, None, 1000.0 * i, 60.0, 300, {"cpu": 0.1}) for i in range(1, 4)]
    served.store.restarts.add(served.facts.name, record)
    predicted(served, uuid, END, cpu=2.5)
    need = served.needs(served.host.domains.get("a"), 1800.0)
    assert (need.resources.cpu, "restarts" in need.reason) == (250, False)


def test_the_span_of_restarts_is_the_longest_that_fits() -> None:
    def spans(*seconds: int, horizon: int = 3600) -> set[int]:
        return {r.span for r in of_span([Restart("a", None, 1.0, None, s, {}) for s in seconds], horizon)}

    assert spans(300, 1800, 3600) == {3600}
    assert spans(300, 1800, 3600, horizon=1800) == {1800}
    assert spans(7200, 9000) == {7200}
    assert spans() == set()


def test_pool_show_adds_up_what_is_forecast(site: FakeSite, served: Engine) -> None:
    first = add(site, "a", memory=512, vcpus=2)
    add(site, "b", memory=256, vcpus=1)
    before = {row["resource"]: row["forecast"] for row in pools.show(served)}
    assert (before["cpu"], before["memory"]) == (300, 768 * MIB)
    predicted(served, first, END, cpu=0.5)
    served.needs = Expected(served)
    assert {row["resource"]: row["forecast"] for row in pools.show(served)}["cpu"] == 150


def test_an_interruption_reserves_what_is_forecast(site: FakeSite, served: Engine) -> None:
    uuid = add(site, "a", memory=512, vcpus=2)
    predicted(served, uuid, END, cpu=0.5, memory=100.0)
    (outcome,) = interrupt.vms(served, ["a"], Rung.POWER_OFF, back=600.0, grace=1.0, reason="test")
    assert "memory by max_1h" in outcome.result["forecast"]
    (away,) = served.store.pool.away(served.facts.name)
    assert 100 * MIB < away.goal.allocation.memory < 512 * MIB
    assert "forecast of" in away.forecast
    (kept_for_it,) = served.store.pool.reservations(served.facts.name)
    assert kept_for_it.size.memory == away.goal.allocation.memory


def test_top_shows_what_is_forecast(site: FakeSite, engine: Engine, run: Run) -> None:
    now = time.time()
    engine.clock = lambda: now
    uuid = site.world.add_vm("a", record=Record(Allocation(1, 256 * MIB)))
    engine.store.samples.add(engine.facts.name, [Sample(uuid, "a", int(now), 10.0, cpu=0.25, vcpus=1)])
    predicted(engine, uuid, int(now) - 60, cpu=0.5, memory=100.0, disk=3.0, network=2.0)
    (line,) = Top(engine, Resource.CPU, kept_forecasts).look(1.0)
    assert line.forecast == Use(cpu=0.5, memory=100 * MIB, disk=3000, network=2e6)
    assert "0.5, 100 MiB" in run("top", "-n", "1").out


# --- retraining


@pytest.fixture
def trained(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was trained and promoted, without the training itself, which tests of models have."""
    done: list[str] = []
    card = ModelCard("new", "2026-01-01T00:00:00Z", "record.parquet", 30, 3.0, 1000, "f", 1, {}, {})

    def train(_settings: object, data: Path, _say: object, **_more: Any) -> ModelCard:
        assert data.is_file()
        done.append(f"trained {data.name}")
        return card

    monkeypatch.setattr(models, "train", train)
    monkeypatch.setattr(models, "promote", lambda _s, name, data: done.append(f"promoted {name}"))
    return done


@pytest.mark.parametrize(("vms", "days"), [(29, 3.1), (31, 1.5)])
def test_too_little_record_trains_nothing(engine: Engine, trained: list[str], vms: int, days: float) -> None:
    put(engine, sized(vms, days))
    assert retrain(engine).startswith(f"too little record: {vms} VMs")
    assert trained == []


def sized(vms: int, days: float) -> Series:
    made = fleet(vms, days, resources=("cpu",))
    return replace(made, sizes={"cpu": np.ones(vms, np.float32), "memory": np.ones(vms, np.float32)})


def test_a_long_record_is_trained_on_and_the_better_one_used(
    engine: Engine, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(engine, sized(30, 3.1))
    assert retrain(engine) == "new was trained and is in use"
    assert trained == ["trained record.parquet", "promoted new"]

    def refuse(*_: object) -> None:
        raise RefusedError("the model new is not better than the rules.")

    monkeypatch.setattr(models, "promote", refuse)
    assert retrain(engine) == "new was trained and is not in use: the model new is not better than the rules."
    # A daemon that starts anew trains no other one.
    young = ModelCard("new", "2026-01-01T00:00:00Z", "record.parquet", 30, 3.0, 1000, "f", 1, {}, {})
    monkeypatch.setattr(models, "listed", lambda _: ("new", (young,)))
    engine.clock = lambda: 1767225600.0 + training.ENOUGH_DAYS
    assert retrain(engine) == "the newest model is too young"


def test_both_are_jobs(engine: Engine, run: Run) -> None:
    put(engine, fleet(2, 1), end=time.time())
    done = perform(JOBS["forecast"], Node(engine, Collector(engine)), "ann")
    assert (done.state, done.detail[:14]) == (RunState.DONE, "2 VMs forecast")
    ran = run("-f", "json", "job", "run", "retrain")
    assert json.loads(ran.out)["runs"][0]["detail"].startswith("too little record: 2 VMs")
