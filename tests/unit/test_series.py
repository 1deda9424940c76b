"""The node's record as a series: units, gaps, sizes, starts, and files of it there and back."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.command import FakeSite

from hvctl.engine.operate import Engine
from hvctl.errors import NotFoundError, UsageError
from hvctl.forecasting.series import STEP
from hvctl.model.sample import EventKind, VmEvent
from hvctl.operations import series as verbs
from unit.commandline import Run, runner
from unit.fleets import fleet
from unit.record import MIB, NOW, put

END = int(NOW) // STEP * STEP


@pytest.fixture
def run(site: FakeSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(site, monkeypatch, capsys)


def rows(engine: Engine, *at: int, uuid: str = "u-a", **columns: Any) -> None:
    engine.clock = lambda: NOW
    data = {"uuid": [uuid] * len(at), "at": list(at), **{k: [v] * len(at) for k, v in columns.items()}}
    engine.store.samples.put_series(engine.facts.name, {uuid: "a"}, data)


def test_units_of_every_resource(engine: Engine) -> None:
    rows(
        engine, END - STEP, cpu_mean=1.5, memory_used_mean=100 * MIB, disk_read_bytes_mean=3000.0,
        disk_write_bytes_mean=1000.0, net_rx_bytes_mean=1e6, net_tx_bytes_mean=25e4, disk_reads_mean=7.0,
        disk_writes_mean=2.0, vcpus=4, memory=512 * MIB,
    )  # fmt: skip
    found = verbs.history(engine)
    assert {r: float(v[0, -1]) for r, v in found.values.items()} == {
        "cpu": 1.5, "memory": 100, "disk": 4, "network": 10, "iops": 9,
    }  # fmt: skip
    assert (found.size("cpu")[0], found.size("memory")[0]) == (4, 512)
    assert np.isnan(found.size("disk")).all()
    assert found.slots == 7 * 288


def test_what_nobody_measured_is_a_gap(engine: Engine) -> None:
    rows(engine, END - 4 * STEP, cpu_mean=1.0, disk_read_bytes_mean=5.0)
    rows(engine, END - STEP, cpu_mean=2.0)
    found = verbs.history(engine, seconds=4 * STEP)
    assert np.array_equal(found.values["cpu"][0], [1, np.nan, np.nan, 2], equal_nan=True)
    assert np.isnan(found.values["disk"]).all()  # the writes are unknown
    assert np.isnan(found.size("cpu")).all()


def test_a_late_roll_up_is_no_gap_and_a_dead_one_is(engine: Engine) -> None:
    rows(engine, END - 3 * STEP, cpu_mean=1.0)
    late = verbs.history(engine)
    assert late.start + late.slots * STEP == END - 2 * STEP
    assert late.values["cpu"][0, -1] == 1
    engine.clock = lambda: NOW + 3600
    dead = verbs.history(engine)
    assert dead.start + dead.slots * STEP == END + 3600
    assert np.isnan(dead.values["cpu"][0, -1])


def test_only_the_past_of_the_time_asked_for(engine: Engine) -> None:
    rows(engine, END - 2 * STEP, END - STEP, cpu_mean=1.0)
    found = verbs.history(engine, ["u-a", "nobody"], seconds=3 * STEP, until=END - STEP + 10)
    assert found.vms == ("u-a", "nobody")
    assert np.array_equal(found.values["cpu"], [[np.nan, np.nan, 1], [np.nan] * 3], equal_nan=True)


def test_sizes_are_the_most_that_was_allocated_and_starts_the_last(engine: Engine) -> None:
    rows(engine, END - 2 * STEP, cpu_mean=1.0, vcpus=4)
    rows(engine, END - STEP, cpu_mean=1.0, vcpus=1)
    events = [
        VmEvent("u-a", "a", kind, at)
        for kind, at in ((EventKind.START, END - 900), (EventKind.RESTART, END - 700), (EventKind.STOP, END - 500))
    ]
    engine.store.samples.add(engine.facts.name, [], events)
    found = verbs.history(engine)
    assert found.size("cpu")[0] == 4
    assert found.starts is not None
    assert found.starts[0] == END - 700


@pytest.mark.parametrize("name", ["record.parquet", "record.csv"])
def test_a_record_goes_out_and_comes_in(engine: Engine, tmp_path: Path, name: str) -> None:
    made = fleet(3, 2)
    for values in made.values.values():
        values[1, 100:120] = np.nan
    made.values["memory"][2, :50] = np.nan
    put(engine, made)
    there = verbs.history(engine)
    path = tmp_path / name
    moved = verbs.export_file(engine, path, NOW - 7 * 86400)
    assert (moved.rows, moved.vms) == (3 * 576 - 20, 3)
    engine.store.samples.prune(engine.facts.name, int(NOW), int(NOW))
    assert not verbs.history(engine).vms
    assert verbs.import_file(engine, path) == verbs.Moved(3 * 576 - 20, 3)
    back = verbs.history(engine)
    assert back.vms == there.vms
    for resource in there.values:
        assert np.allclose(back.values[resource], there.values[resource], rtol=1e-5, equal_nan=True), resource
    assert np.allclose(back.size("memory"), there.size("memory"))


def test_requests_of_disks_go_out_and_come_in(engine: Engine, tmp_path: Path) -> None:
    rows(engine, END - 2 * STEP, cpu_mean=1.0, disk_reads_mean=7.0, disk_writes_mean=2.0)
    rows(engine, END - STEP, cpu_mean=1.0)
    path = tmp_path / "a.parquet"
    verbs.export_file(engine, path, NOW - 3600)
    engine.store.samples.prune(engine.facts.name, int(NOW), int(NOW))
    verbs.import_file(engine, path)
    assert np.array_equal(verbs.history(engine).values["iops"][0, -2:], [9, np.nan], equal_nan=True)


def test_what_a_node_does_not_keep_is_not_taken(engine: Engine, tmp_path: Path) -> None:
    put(engine, fleet(2, 2))
    path = tmp_path / "a.parquet"
    verbs.export_file(engine, path, NOW - 7 * 86400)
    engine.clock = lambda: NOW + 89 * 86400
    assert verbs.import_file(engine, path).left_out == 2 * 289  # a minute of the clock is a slot
    engine.clock = lambda: NOW + 100 * 86400
    with pytest.raises(UsageError, match="last 90 days"):
        verbs.import_file(engine, path)
    engine.clock = lambda: NOW - 100 * 86400
    with pytest.raises(UsageError, match="last 90 days"):
        verbs.import_file(engine, path)


def test_nothing_to_export(engine: Engine, tmp_path: Path) -> None:
    engine.clock = lambda: NOW
    with pytest.raises(NotFoundError, match="nothing was measured"):
        verbs.export_file(engine, tmp_path / "a.parquet", NOW - 86400)
    with pytest.raises(UsageError, match="ends before"):
        verbs.export_file(engine, tmp_path / "a.parquet", 10.0, 5.0)


def test_the_commands(engine: Engine, run: Run, tmp_path: Path) -> None:
    put(engine, fleet(2, 2), end=time.time())
    path = str(tmp_path / "a.csv")
    done = run("-f", "json", "series", "export", path, "--since", "1d", "--until", "12h")
    assert done.status == 0, done.err
    assert json.loads(done.out)["series"] == {"rows": 288, "vms": 2, "left_out": 0}
    assert run("series", "export", str(tmp_path / "none" / "a.csv")).status == 1
    assert run("series", "export", str(tmp_path / "none" / "a.parquet")).status == 1
    assert run("series", "import", path).out == "taken  288 rows of 2 VMs\n"
    assert run("series", "export", path, "--since", "yesterday").status == 2
