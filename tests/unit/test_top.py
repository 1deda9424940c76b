"""hvctl top: from the daemon's samples or from its own readings, sorted, and in every form of output."""

from __future__ import annotations

import json
import os
import pty
import time

import pytest
from faults.command import FakeSite

from hvctl.cli.top import COLUMNS, fitting, sparkline
from hvctl.engine.operate import Engine
from hvctl.model.sample import Sample
from hvctl.operations import top as module
from hvctl.operations.top import Line, Resource, Top, Use
from unit.commandline import Run, runner


@pytest.fixture
def run(site: FakeSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(site, monkeypatch, capsys)


@pytest.fixture
def passing(site: FakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """While top waits, time passes in the world and VM a works."""
    site.world.pass_time(0)

    def sleep(seconds: float) -> None:
        site.world.pass_time(seconds)
        site.world.work("a", cpu=int(seconds * 5e8), write_bytes=int(seconds * 1000), rx_bytes=int(seconds * 100))

    monkeypatch.setattr(time, "sleep", sleep)


def samples(vm: str, *cpu: float, age: float = 0.0, now: int | None = None, **values: float) -> list[Sample]:
    """now: of VMs that one cycle saw, so that no second passes between them."""
    now = int(time.time() - age) if now is None else now
    made = range(1 - len(cpu), 1)
    return [Sample(f"u-{vm}", vm, now + 10 * i, 10.0, cpu=c, vcpus=2, **values) for i, c in zip(made, cpu, strict=True)]


def lines(engine: Engine, sort: Resource = Resource.CPU) -> list[Line]:
    return Top(engine, sort).look(2.0)


def test_the_daemons_samples_where_it_collects(engine: Engine) -> None:
    host, store, now = engine.facts.name, engine.store.samples, int(time.time())
    store.add(host, samples("a", 0.5, 1.0, 0.25, now=now, memory_used=100.0))
    store.add(host, samples("b", 0.75, now=now, memory_used=50.0, net_rx_bytes=10.0, net_tx_bytes=5.0))
    store.add(host, samples("gone", 0.9, age=20))
    assert [line.name for line in lines(engine)] == ["b", "a"]
    assert [line.name for line in lines(engine, Resource.MEMORY)] == ["a", "b"]
    a = lines(engine, Resource.CPU)[1]
    assert (a.trend, a.used.cpu, a.allocated.cpu, a.used.network) == ([0.5, 1.0, 0.25], 0.25, 2, None)
    assert lines(engine)[0].used.network == 120


@pytest.mark.usefixtures("passing")
def test_samples_of_long_ago_are_not_now(site: FakeSite, engine: Engine) -> None:
    site.world.add_vm("a")
    engine.store.samples.add(engine.facts.name, samples("old", 0.75, age=40))
    assert [(line.name, line.used.cpu) for line in lines(engine)] == [("a", 0.5)]


@pytest.mark.usefixtures("passing")
def test_without_a_daemon_it_measures_itself(site: FakeSite, engine: Engine) -> None:
    site.world.add_vm("a")
    site.world.add_vm("b", vcpus=2)
    watched = Top(engine, Resource.CPU)
    first = watched.look(2.0)
    assert [(v.name, v.used.cpu, v.used.disk, v.used.network) for v in first] == [("a", 0.5, 1000, 800), ("b", 0, 0, 0)]
    assert first[1].per_vcpu == ((0, 0.0), (1, 0.0))
    time.sleep(2.0)
    assert watched.look(2.0)[0].trend == [0.5, 0.5]


@pytest.mark.usefixtures("passing")
def test_what_is_promised_and_forecast_stands_beside_it(site: FakeSite, engine: Engine, run: Run) -> None:
    uuid = site.world.add_vm("a")
    assert run("allocate", "a", "--cpu-quota", "50%", "--iops", "100").status == 0
    (line,) = lines(engine)
    assert line.promised == Use(cpu=0.5, memory=256 << 20, iops=100)
    assert line.forecast == Use()
    (line,) = Top(engine, Resource.CPU, lambda _, uuids: {u: Use(cpu=1.5) for u in uuids}).look(2.0)
    assert (line.uuid, line.forecast) == (uuid, Use(cpu=1.5))


@pytest.mark.usefixtures("passing")
def test_plain_lines_in_a_pipe(site: FakeSite, run: Run) -> None:
    site.world.add_vm("a")
    done = run("top", "--interval", "1")
    head, row = done.out.splitlines()
    assert head.split() == ["VM", "CPU", "MEMORY", "DISK", "IOPS", "NETWORK", "FORECAST", "PROMISED", "TREND"]
    assert row.split() == [
        "a",
        "0.5",
        "of",
        "1",
        "64",
        "MiB",
        "of",
        "256",
        "MiB",
        "1000",
        "B/s",
        "0",
        "800",
        "bit/s",
        "-",
        "-",
        "█",
    ]
    assert len(run("top", "--sort", "disk", "--count", "3").out.splitlines()) == 6


@pytest.mark.usefixtures("passing")
def test_one_document(site: FakeSite, run: Run) -> None:
    site.world.add_vm("a")
    document = json.loads(run("-f", "json", "top", "-n", "2").out)
    (line,) = document["vms"]
    assert document["schema_version"] == 1
    assert (line["used"]["cpu"], line["trend"]) == (0.5, [0.5, 0.5])
    assert run("-f", "csv", "top").out.startswith("name,uuid,at,used,")


def test_a_guests_name_is_no_escape_on_a_terminal(
    site: FakeSite, run: Run, passing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.world.add_vm("a")
    site.world.add_vm("\x1b[31mred\n[bold]x[/bold]")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        monkeypatch.setenv("COLUMNS", "150")
        monkeypatch.setenv("TERM", "xterm")
        assert run("top", "--count", "1").status == 0
        terminal.flush()
        shown = os.read(master, 65536).decode()
        os.close(master)
    assert "\\x1b[31mred\\n[bold]x[/bold]" in shown
    assert "\x1b[31m" not in shown
    assert "0.5 of 1" in shown


def test_a_look_that_says_nothing_says_why(site: FakeSite, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else an operator reads that there are no VMs."""
    site.world.add_vm("a")
    site.world.pass_time(0)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    done = run("top")
    assert (len(done.out.splitlines()), done.err) == (1, "no rates this time: no time lies between two readings\n")


def test_a_narrow_terminal_has_fewer_columns() -> None:
    keys = [c.key for c in COLUMNS]
    row = dict.fromkeys(keys, "x" * 10)
    wide = len(keys) * 12 - 2
    assert [c.key for c in fitting([row], wide, "cpu")] == keys
    assert [c.key for c in fitting([row], wide - 1, "cpu")] == keys[:-1]
    assert [c.key for c in fitting([row], 20, "network")] == ["name", "cpu", "memory", "network"]


def test_sparklines() -> None:
    assert sparkline([0, 1, None, 7]) == "▁▂ █"
    assert sparkline([0, 0]) == "▁▁"
    assert sparkline([]) == sparkline([None]).strip() == ""


def test_the_trend_is_no_longer_than_what_is_kept(engine: Engine) -> None:
    engine.store.samples.add(engine.facts.name, samples("a", *[0.5] * (module.TREND + 3)))
    assert len(lines(engine)[0].trend) == module.TREND


@pytest.mark.usefixtures("passing")
def test_how_fast_a_vm_dirties_its_memory(site: FakeSite, run: Run) -> None:
    site.world.add_vm("a")
    site.world.work("a", dirty=20 << 20)
    assert run("vm", "dirty-rate", "a", "--seconds", "2").out.splitlines()[1].split() == [
        "dirtied",
        "10",
        "MiB/s",
        "over",
        "2",
        "s",
    ]
    site.world.destroy("a")
    assert run("vm", "dirty-rate", "a").status == 5
