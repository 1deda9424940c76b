"""hvctl forecast and hvctl profile: what is said of one VM, by whom, and beside what came."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.command import FakeSite

from hvctl.adapters.models import modelstore
from hvctl.adapters.models.boosters import Boosters
from hvctl.adapters.models.boostertraining import Lesson, train
from hvctl.adapters.models.modelstore import ModelStore
from hvctl.engine.expected import last_hour
from hvctl.engine.operate import Engine
from hvctl.errors import NotFoundError, RefusedError, UsageError
from hvctl.forecasting.features import FEATURES, feature_hash
from hvctl.forecasting.series import STEP, Series
from hvctl.model.allocation import Allocation, Record
from hvctl.model.forecast import Answerer, ModelCard
from hvctl.model.prediction import Recorded
from hvctl.model.restart import Restart
from hvctl.model.sample import EventKind, Sample, VmEvent
from hvctl.operations import explain as explaining
from hvctl.operations import forecast as verbs
from hvctl.operations import model as models
from hvctl.operations import profile
from hvctl.operations.forecast import Question, forecast_vm
from hvctl.operations.series import import_file
from unit.commandline import Run, runner
from unit.fleets import fleet
from unit.record import MIB, NOW, put

RESOURCES = ("cpu", "memory", "disk", "network")


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What hvctl is shipped with is another test's matter."""
    monkeypatch.setattr(modelstore, "shipped_folder", lambda: tmp_path / "shipped")


@pytest.fixture
def run(site: FakeSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(site, monkeypatch, capsys)


@pytest.fixture
def vm(site: FakeSite) -> str:
    return site.world.add_vm("a")


def recorded(engine: Engine, vm: str, days: float = 3, end: float = NOW) -> Series:
    made = replace(fleet(1, days), vms=(vm,))
    put(engine, made, {vm: "a"}, end)
    return made


@pytest.fixture(scope="module")
def text() -> str:
    """A model of CPU peaks that goes by the feature `max_1h` alone; of medians, which few trees can learn."""
    x = np.random.default_rng(2).normal(size=(1000, len(FEATURES))).astype(np.float32)
    at = FEATURES.index("max_1h")
    x[:, at] *= 0.3
    y = x[:, at] * 0.5
    trees = {"trees": 8, "learning_rate": 0.3, "num_leaves": 31, "min_data_in_leaf": 5}
    lesson = Lesson("cpu-peak-0.95", "cpu", y, np.ones(1000, np.float32), 0.5, 0.0, trees)
    return train({"cpu": x}, [lesson], seconds=100)["cpu-peak-0.95"].text


@pytest.fixture
def won(engine: Engine, text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model in use that has won with the CPU, and is not too slow on a busy machine."""
    monkeypatch.setattr(models, "PATIENCE", 60.0)
    card = ModelCard("one", "2026-01-01T00:00:00Z", "fleet", 1, 1.0, 1000, feature_hash(), len(FEATURES), {}, {})
    store = ModelStore(engine.settings)
    store.add(card, {"cpu-peak-0.95": text})
    store.promote("one")
    engine.store.forecasts.learn(
        engine.facts.name, [Recorded("cpu", "peak", "one", 0.5, 1.0, 1000, 50, True, 0)], [], []
    )
    return "one"


def of(told: verbs.Told, resource: str = "cpu") -> Any:
    (line,) = [f for f in told.lines if f.resource == resource]
    return line


def test_every_resource_has_an_answer(engine: Engine, vm: str) -> None:
    made = recorded(engine, vm)
    told = forecast_vm(engine, "a", Question(horizon=1800))
    assert [f.resource for f in told.lines] == list(RESOURCES)
    assert {(f.answered, f.horizon, f.gap, f.quantile) for f in told.lines} == {(Answerer.BASELINE, 1800, 0, 0.95)}
    assert (told.vm, told.uuid, told.made_at) == ("a", vm, NOW - 60)
    assert of(told).history == 3 * 86400
    assert float(made.values["cpu"][0, -12:].max()) <= of(told).peak <= float(made.size("cpu")[0])
    assert "no model" in of(told).reason
    assert told.came == {}


def test_too_little_history_and_none_at_all(engine: Engine, vm: str) -> None:
    engine.clock = lambda: NOW
    with pytest.raises(RefusedError, match="nothing was measured of a") as refused:
        forecast_vm(engine, "a", Question())
    assert "hvctl node run" in (refused.value.hint or "")
    with pytest.raises(NotFoundError):
        forecast_vm(engine, "nobody", Question())
    recorded(engine, vm, days=6 / 288)
    assert of(forecast_vm(engine, vm, Question())).answered is Answerer.TOO_LITTLE_HISTORY


@pytest.mark.parametrize(
    "wrong", [Question(horizon=60), Question(quantile=0.4), Question(quantile=0.999), Question(gap=-1)]
)
def test_what_is_never_forecast(engine: Engine, vm: str, wrong: Question) -> None:
    with pytest.raises(UsageError, match="is not forecast"):
        forecast_vm(engine, vm, wrong)


def test_imported_vms_are_forecast_too(engine: Engine) -> None:
    put(engine, fleet(2, 1), {"vm-0": "trace"})
    assert forecast_vm(engine, "trace", Question()).uuid == "vm-0"
    assert forecast_vm(engine, "vm-1", Question()).vm == "vm-1"


def test_as_of_then_it_knows_nothing_of_what_came(engine: Engine, vm: str) -> None:
    made = recorded(engine, vm)
    then = int(NOW) // STEP * STEP - 7200
    past = forecast_vm(engine, "a", Question(at=then + 10))
    assert past.made_at == then
    made.values["cpu"][0, -24:-12] = 7.0
    engine.store.samples.prune(engine.facts.name, int(NOW), int(NOW))
    put(engine, made, {vm: "a"})
    again = forecast_vm(engine, "a", Question(at=then + 10))
    assert of(again).peak == of(past).peak
    assert again.came["cpu"] == (7.0, 7.0)
    assert again.document()["resources"][0]["actual_peak"] == 7.0
    with pytest.raises(UsageError, match="nothing is known"):
        forecast_vm(engine, "a", Question(at=NOW + 10))


def test_the_model_answers_where_it_has_won_here(engine: Engine, vm: str, won: str) -> None:
    recorded(engine, vm)
    told = forecast_vm(engine, "a", Question())
    assert (of(told).answered, of(told).rule, of(told).model) == (Answerer.MODEL, "one", "one")
    assert of(told, "memory").answered is Answerer.BASELINE
    # What another model has won is nothing to this one.
    engine.store.forecasts.learn(
        engine.facts.name, [Recorded("cpu", "peak", "two", 0.5, 1.0, 1000, 50, True, 0)], [], []
    )
    assert of(forecast_vm(engine, "a", Question())).answered is Answerer.BASELINE


def test_a_spoilt_model_leaves_the_rules(engine: Engine, vm: str, won: str) -> None:
    recorded(engine, vm)
    (ModelStore(engine.settings).folder(won) / "cpu-peak-0.95.txt").write_text("spoilt")
    line = of(forecast_vm(engine, "a", Question()))
    assert line.answered is Answerer.BASELINE
    assert "not the one that its card names" in line.reason


def restarted(engine: Engine, vm: str, *peaks: float, at: float = 1000.0, span: int = 3600) -> None:
    record = [Restart(vm, None, at + 100.0 * i, 60.0, span, {"cpu": p}) for i, p in enumerate(peaks)]
    engine.store.restarts.add(engine.facts.name, record)


def test_after_an_interruption(engine: Engine, vm: str) -> None:
    recorded(engine, vm)
    asked = Question(gap=1800, after=True)
    plain = forecast_vm(engine, "a", asked)
    assert of(plain).answered is Answerer.BASELINE
    assert of(plain).reason.startswith("there is no model 'shipped'; too few restarts are recorded")
    restarted(engine, vm, 0.01, 0.01, 0.01)
    low = of(forecast_vm(engine, "a", asked))
    assert (low.answered, low.peak) == (Answerer.BASELINE, of(plain).peak)
    assert "3 restarts of this VM ask for no more" in low.reason
    high = of(plain).peak + 3
    restarted(engine, vm, *[high] * 40, at=2000.0)
    told = of(forecast_vm(engine, "a", asked))
    assert (told.answered, told.coverage) == (Answerer.RESTARTS, None)
    assert told.peak == pytest.approx(high)
    assert "40 restarts of this VM" in told.reason
    assert of(forecast_vm(engine, "a", Question(gap=1800))).answered is Answerer.BASELINE
    # No VM can use more than it has.
    restarted(engine, vm, *[900.0] * 40, at=9000.0)
    assert of(forecast_vm(engine, "a", asked)).peak == 40


def test_the_last_hour_is_that_of_its_samples(engine: Engine, vm: str) -> None:
    store, host = engine.store.samples, engine.facts.name
    samples = [(-4000, 9.0, None), (-3000, 2.0, 50.0 * MIB), (-100, 1.0, 80.0 * MIB), (50, 7.0, None)]
    store.add(host, [Sample(vm, "a", int(NOW) + at, 10.0, cpu=c, memory_used=m) for at, c, m in samples])
    store.add(host, [Sample("other", "b", int(NOW) - 10, 10.0, cpu=8.0)])
    assert last_hour(engine, vm, NOW) == {"cpu": 2.0, "memory": 80.0}


def test_what_moved_the_model(engine: Engine, vm: str, won: str) -> None:
    recorded(engine, vm)
    told = forecast_vm(engine, "a", Question())
    cpu, memory = explaining.explain(told)[:2]
    assert isinstance(told.panel.models, Boosters)
    assert cpu.features[0].name == "max_1h"
    assert cpu.features[0].gain > 0.5
    assert cpu.features[0].change != 0
    assert all(abs(f.change) < abs(cpu.features[0].change) for f in cpu.features[1:])
    assert cpu.model_peak == pytest.approx(of(told).peak, rel=1e-4)
    assert (cpu.answered, cpu.rule) == ("model", memory.rule)
    assert (memory.model_peak, memory.features) == (None, ())
    assert "no part memory-peak-0.95" in memory.why
    assert memory.rule_peak == of(told, "memory").peak


# --- the commands


def test_the_command(site: FakeSite, engine: Engine, vm: str, run: Run, tmp_path: Path) -> None:
    recorded(engine, vm, end=time.time())
    done = run("-f", "json", "forecast", "a", "--horizon", "30m", "--after-interruption", "--gap", "15m",
               "--quantile", "0.5", "--explain")  # fmt: skip
    assert done.status == 0, done.err
    document = json.loads(done.out)["forecast"]
    assert (document["gap"], document["horizon"], document["quantile"]) == (900, 1800, 0.5)
    assert document["after_interruption"] is True
    assert [r["resource"] for r in document["resources"]] == list(RESOURCES)
    assert [e["rule"] for e in document["explanation"]] == [r["rule"] for r in document["resources"]]
    table = run("forecast", "a", "--explain").out
    assert table.splitlines()[1].split()[0] == "cpu"
    assert "\ncpu: the model says nothing cores" in table
    assert "\ncpu: the model says nothing cores at 0.95, " in run("forecast", "a", "--explain", "--quantile", "0.8").out
    assert run("-f", "csv", "forecast", "a").out.startswith("resource,unit,peak")
    assert run("forecast", "a", "--gap", "15m").status == 2
    assert run("forecast", "a", "--quantile", "0.4").status == 2
    past = run("-f", "json", "forecast", "a", "--at", "3h")
    assert json.loads(past.out)["forecast"]["resources"][0]["actual_peak"] > 0


@pytest.mark.parametrize(("kind", "head"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_a_picture(engine: Engine, vm: str, run: Run, tmp_path: Path, kind: str, head: bytes) -> None:
    recorded(engine, vm, end=time.time())
    path = tmp_path / f"out.{kind}"
    assert run("forecast", "a", "--at", "2h", "--plot", str(path)).status == 0
    assert path.read_bytes().startswith(head)
    if kind == "svg":
        assert b"what came" in path.read_bytes()
        assert run("forecast", "a", "--plot", str(tmp_path / "out.gif")).status == 2
    else:
        assert run("forecast", "a", "--plot", str(tmp_path / "none" / "out.png")).status == 1


# --- profiles


def test_a_profile(site: FakeSite, engine: Engine, run: Run) -> None:
    vm = site.world.add_vm("a", record=Record(Allocation(1, 256 * MIB), labels={"job-type": "ci"}))
    made = recorded(engine, vm, days=1)
    host, store = engine.facts.name, engine.store.samples
    events = [
        VmEvent(vm, "a", kind, NOW - 500 + i, "save", i + 1)
        for i, kind in enumerate((EventKind.INTERRUPTION, EventKind.STOP, EventKind.RESTART))
    ]
    store.add(host, [Sample(vm, "a", int(NOW) - 5, 10.0, uptime=321.0, connections=7.0)], events)
    found = profile.show(engine, "a")
    assert (found["instance_id"], found["job_type"], found["uptime_seconds"]) == (vm, "ci", 321)
    assert (found["connections"], found["updated_at"]) == (7, int(NOW) - 5)
    cpu = made.values["cpu"][0]
    assert found["cpu_cores"]["average"] == pytest.approx(float(cpu.mean()), rel=1e-4)
    assert found["cpu_cores"]["peak"] == pytest.approx(1.5 * float(cpu.max()), rel=1e-4)
    network = float(made.values["network"][0].mean()) * 1e6
    assert found["network_bits_per_second"]["average"] == pytest.approx(network, rel=1e-4)
    assert found["iops"] == {"average": None, "peak": None}
    assert [(e["kind"], e["operation"]) for e in found["interruptions"]] == [("interruption", 1), ("restart", 3)]
    after, told = found["after_interruption"], forecast_vm(engine, "a", Question(gap=1800, after=True))
    assert after["cpu_cores"] == of(told).peak
    assert after["memory_bytes"] == of(told, "memory").peak * MIB
    assert after["network_bits_per_second"] == of(told, "network").peak * 1e6
    assert after["answered"]["cpu_cores"].startswith("baseline: ")
    shown = run("profile", "show", "a")
    assert shown.status == 0, shown.err
    assert vm in shown.out.splitlines()[0]
    assert "interruptions" in shown.out


def test_a_profile_of_rows_from_elsewhere(engine: Engine, vm: str, tmp_path: Path) -> None:
    """They have means alone: a peak below the average is none."""
    engine.clock = lambda: NOW
    trace = tmp_path / "trace.csv"
    lines = [f"{vm},{int(NOW) // 300 - n},1,256,{cores},100" for n, cores in ((3, 0.2), (2, 0.6), (1, 0.4))]
    trace.write_text("\n".join(["vm,slot,cores,mem_cap_mb,cpu_cores,mem_active_mb", *lines]))
    import_file(engine, trace)
    cpu = profile.show(engine, "a")["cpu_cores"]
    assert (cpu["average"], cpu["peak"]) == (pytest.approx(0.4), pytest.approx(0.6))


def test_a_profile_of_a_vm_that_nobody_measured(engine: Engine, vm: str, run: Run) -> None:
    found = json.loads(run("-f", "json", "profile", "show", "a").out)["profile"]
    assert found["cpu_cores"] == {"average": None, "peak": None}
    assert found["updated_at"] is None
    assert found["after_interruption"]["cpu_cores"] is None
    assert "nothing was measured" in found["after_interruption"]["reason"]
    assert "nothing was measured" in run("profile", "show", "a").out
    assert run("profile", "show", "nobody").status == 3
