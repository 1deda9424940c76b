"""The answer: who gives it, what it says of itself, and that no model can keep anybody from an answer."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvctl.adapters.models import seriesfile
from hvctl.adapters.models.boosters import Silence
from hvctl.errors import NotFoundError, UsageError
from hvctl.forecasting.arbiter import Standing
from hvctl.forecasting.forecast import forecast
from hvctl.forecasting.margin import Kind, Margin, OnlineMargin
from hvctl.forecasting.panel import PATIENCE, Ask, Panel
from hvctl.forecasting.rulebook import Choice, Rulebook
from hvctl.forecasting.series import F32
from hvctl.model.forecast import Answerer, Forecast
from unit.fleets import fleet

FLEET = fleet()
WON = {f"{r}-{t}": Standing(0.8, 1.0, 1000, 50, True) for r in FLEET.values for t in ("peak", "mean")}


@dataclass
class Oracle:
    """Answers the same ratio for every row; asked remembers the keys, waited how long it might have taken for them."""

    ratio: float = 0.0
    silence: str | None = None
    asked: tuple[str, ...] = ()
    waited: tuple[float, ...] = ()

    def within(self, seconds: float) -> Ask:
        self.waited = (*self.waited, seconds)
        return self.say

    def say(self, key: str, x: F32) -> F32 | Silence:
        self.asked = (*self.asked, key)
        return Silence(self.silence) if self.silence else np.full(len(x), self.ratio, np.float32)


def panel(models: Oracle | None, **more: object) -> Panel:
    return Panel(models=models, name="m1", age=5.0, **{"standings": WON, **more})  # type: ignore[arg-type]


def one(found: list[Forecast], vm: str = "vm-0", resource: str = "cpu", quantile: float = 0.95) -> Forecast:
    (line,) = [f for f in found if (f.vm, f.resource, f.quantile) == (vm, resource, quantile)]
    return line


def test_every_vm_resource_and_quantile_has_an_answer() -> None:
    found = forecast(FLEET, Panel(), gap=1800, horizon=1800)
    assert [(f.vm, f.resource, f.quantile) for f in found] == [
        (vm, r, q) for vm in FLEET.vms for r in ("cpu", "memory", "disk", "network") for q in (0.5, 0.95)
    ]
    line = one(found)
    assert (line.unit, line.gap, line.horizon, line.history) == ("cores", 1800, 1800, 7 * 86400)
    assert line.answered is Answerer.BASELINE
    assert line.reason == "there is no model"
    assert line.model is None


def test_quantiles_never_cross_means_stay_below_peaks_and_all_below_the_size() -> None:
    book = Rulebook(
        {
            "cpu-peak-0.5": {12: Choice("max_7d", Margin(Kind.TIMES, 2))},
            "cpu-peak-0.95": {12: Choice("last", Margin(Kind.TIMES, 0.1))},
            "cpu-mean-0.95": {12: Choice("max_7d", Margin(Kind.TIMES, 90))},
        }
    )
    found = forecast(FLEET, Panel(book=book), resources=["cpu"])
    for vm in FLEET.vms:
        low, high = one(found, vm, quantile=0.5), one(found, vm)
        assert 0 < low.peak <= high.peak <= 40
        assert low.mean <= low.peak
        assert high.mean <= high.peak
    assert one(found).rule == "last"


def test_the_model_answers_where_it_has_won() -> None:
    models = Oracle(0.3)
    found = forecast(FLEET, panel(models, standings={"cpu-peak": WON["cpu-peak"]}, coverages={"model-cpu-peak": 0.94}))
    line = one(found)
    assert (line.answered, line.rule, line.model, line.model_age, line.coverage) == (
        Answerer.MODEL,
        "m1",
        "m1",
        5.0,
        0.94,
    )
    assert "0.80 of the rule's" in line.reason
    other = one(found, resource="disk")
    assert other.answered is Answerer.BASELINE
    assert "often enough" in other.reason
    assert models.asked == ("cpu-peak-0.95", "cpu-peak-0.5")
    assert models.waited == (PATIENCE,)


def test_margins_raise_what_the_model_says() -> None:
    plain = one(forecast(FLEET, panel(Oracle(0.0)))).peak
    shifted = one(forecast(FLEET, panel(Oracle(0.0), shifts={"cpu-peak-0.95": 0.2}))).peak
    margin = OnlineMargin(len(FLEET.vms), 0.95, 0.0, 0.05, 0.0)
    margin.learn(np.zeros(30, np.int64), np.ones(30, np.float32))
    followed = forecast(FLEET, panel(Oracle(0.0), margins={"model-cpu-peak": margin}))
    assert shifted == pytest.approx(plain * np.exp(0.2), rel=0.01)
    assert one(followed).peak > shifted
    assert one(followed, "vm-1").peak == one(forecast(FLEET, panel(Oracle(0.0))), "vm-1").peak


def test_a_silent_model_gives_the_baseline_with_its_reason() -> None:
    found = forecast(FLEET, panel(Oracle(silence="it is asleep")))
    assert {f.answered for f in found} == {Answerer.BASELINE}
    assert {f.reason for f in found} == {"it is asleep"}
    assert [f.peak for f in found] == [f.peak for f in forecast(FLEET, Panel())]
    missing = forecast(FLEET, Panel(missing="the file was changed"))
    assert {f.reason for f in missing} == {"the file was changed"}


def test_too_little_history_is_said_and_no_model_is_believed() -> None:
    values = {n: v.copy() for n, v in FLEET.values.items()}
    for v in values.values():
        v[0, :-5] = np.nan
        v[1, :] = np.nan
    found = forecast(replace(FLEET, values=values), panel(Oracle(2.0)))
    line = one(found)
    assert line.answered is Answerer.TOO_LITTLE_HISTORY
    assert "25 minutes" in line.reason
    assert line.peak < 1.6 * float(np.nanmax(values["cpu"][0]))
    assert line.rule != "m1"
    assert one(found, "vm-1").answered is Answerer.TOO_LITTLE_HISTORY
    assert np.isfinite(one(found, "vm-1").peak)
    assert one(found, "vm-2").answered is Answerer.MODEL


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_series_come_back_from_files(tmp_path: Path, suffix: str) -> None:
    values = {n: v[:, :300].copy() for n, v in FLEET.values.items()}
    for v in values.values():
        v[2, 50:60] = np.nan
    series = replace(FLEET, values=values, start=288 * 300 * 20000)
    seriesfile.write(tmp_path / f"s.{suffix}", series)
    back = seriesfile.read(tmp_path / f"s.{suffix}")
    assert (back.vms, back.start) == (series.vms, series.start)
    for name, v in values.items():
        np.testing.assert_allclose(back.values[name], v, rtol=1e-5)
        np.testing.assert_allclose(back.size(name), series.size(name), rtol=1e-5)


def test_a_vm_that_is_off_is_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(
            [
                ["vm", "slot", "cores", "cpu_cores"],
                ["b", 300, 2, 1.5],
                ["b", 301, 0, 0],
                ["a", 290, 4, -1],
                ["a", 291, 4, 1],
            ]
        )
    found = seriesfile.read(path)
    assert (found.vms, found.start, found.slots) == (("a", "b"), 288 * 300, 14)
    assert np.isnan(found.values["cpu"][1, 13])
    assert np.isnan(found.values["cpu"][0, 2])
    assert found.values["cpu"][1, 12] == 1.5
    assert found.size("cpu").tolist() == [4, 2]
    assert np.isnan(found.size("memory")).all()


def test_lists_of_a_day_are_vms(tmp_path: Path) -> None:
    table = pa.table({"day": ["1", "2"], "vm": ["a", "a"], "cpu_pct": [[10, 20, 30], [40, 50]]})
    pq.write_table(table, tmp_path / "p.parquet")
    found = seriesfile.read(tmp_path / "p.parquet")
    assert found.vms == ("a@1", "a@2")
    np.testing.assert_allclose(found.values["cpu"], [[0.1, 0.2, 0.3], [0.4, 0.5, np.nan]], rtol=1e-6)
    assert found.size("cpu").tolist() == [1, 1]


def test_files_that_are_none_are_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        seriesfile.read(tmp_path / "nothing.csv")
    contents = {
        "text.parquet": b"hello",
        "empty.csv": b"",
        "columns.csv": b"vm,slot,colour\n1,2,3\n",
        "words.csv": b"vm,slot,cpu_cores\n1,2,much\n",
        "slots.csv": b"vm,slot,cpu_cores\n1,soon,1\n",
        "rows.csv": b"vm,slot,cpu_cores\n",
        "span.csv": b"vm,slot,cpu_cores\n1,1,1\n1,9000000000,1\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError) as caught:
            seriesfile.read(tmp_path / name)
        assert caught.value.hint
        assert name in caught.value.message
