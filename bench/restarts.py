"""`make bench-restarts`: micro VMs run a service with a boot storm and are stopped and started again; what hvctl's own
record of restarts predicts for the next one's first moments, beside the rolling forecast of the same moment.

Time runs 150 times faster than on a node: a sample of two seconds stands for a slot of five minutes, so the hour after
a start is 24 seconds, boot included. Each service has a storm of its own size, which differs from start to start, and a
steady load that is not the storm's; neither predictor is told any of it. `pinball_gain_vs_rolling` is 1 - the record's
loss / the rolling forecast's, at 0.95, the mean over resources and restarts that had at least three before them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from host.outside import Guest
from host.worker import plant
from report import say, write

from hvctl.decide.afterstart import demand, peaks
from hvctl.decide.restarts import OWN, need_after_restart, pinball
from hvctl.engine.collect import Collector
from hvctl.engine.operate import Engine
from hvctl.engine.runtime import open_engine
from hvctl.errors import HvctlError
from hvctl.forecasting.forecast import forecast
from hvctl.forecasting.series import STEP, Series
from hvctl.model.restart import Restart
from hvctl.operations import model as models
from hvctl.operations import restarts
from hvctl.operations import vm as vms
from hvctl.settings import Settings

MIB = 1 << 20
SLOT = 2
"""Seconds of a sample, which stands for a slot of five minutes."""
HOUR = 12 * SLOT
STEADY = 12.0
QUANTILE = 0.95
RESOURCES = ("cpu", "memory", "disk")
SIZES = {"cpu": 1.0, "memory": 192.0}


@dataclass(frozen=True, slots=True)
class Service:
    """What one VM's program does: the middle of its storm, which varies by a tenth, and its steady load."""

    guest: Guest
    storm: tuple[int, int, int]
    steady: tuple[int, int, int]

    def arguments(self, chance: random.Random) -> str:
        storm = (round(v * chance.uniform(0.9, 1.1)) for v in self.storm)
        return " ".join(map(str, (chance.randint(4, 6), *storm, *self.steady)))


def services(engine: Engine, count: int, folder: Path, made: contextlib.ExitStack) -> list[Service]:
    chance, found = random.Random(9), []
    for n in range(count):
        name = f"bench-{os.getpid()}-{n}"
        made.callback(_remove, engine, name)
        vms.create(
            engine,
            vms.NewVm(
                name=name, image="micro", vcpus=1, max_vcpus=1, memory=192 * MIB, max_memory=192 * MIB, disks=None,
                bridges=(), labels={}, start=False,
            ),
        )  # fmt: skip
        guest = Guest(name, engine.host.domains.uuid(name))
        plant(guest, folder, "service")
        storm = (chance.randint(45, 60), chance.randint(40, 60), chance.randint(1500, 3000))
        found.append(Service(guest, storm, (chance.randint(5, 15), chance.randint(5, 15), chance.randint(50, 200))))
    return found


def start(engine: Engine, service: Service, chance: random.Random) -> None:
    vms.start(engine, service.guest.name)
    service.guest.await_answer()
    run = "dd if=/dev/vda of=/run/service bs=1M count=2; chmod 755 /run/service"
    service.guest.run(f"{run}; setsid /run/service {service.arguments(chance)} /dev/vda > /dev/null 2>&1 &")


@contextlib.contextmanager
def watched(engine: Engine) -> Iterator[None]:
    """A sample every SLOT seconds meanwhile, as a node's daemon takes them."""
    collector, over = Collector(engine, 3.0 * SLOT), threading.Event()

    def look() -> None:
        while not over.wait(SLOT - time.time() % SLOT):
            collector.cycle()

    collector.cycle()
    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def rolling(engine: Engine, service: Service, now: float) -> dict[str, float]:
    """The forecast of the peak of the coming hour as a VM that goes on would get it."""
    samples = engine.store.samples.latest(engine.facts.name, 0, [service.guest.uuid])
    first = samples[0].at
    values = {r: np.full((1, (int(now) - first) // SLOT + 1), np.nan, np.float32) for r in RESOURCES}
    for sample in samples:
        for resource in RESOURCES:
            value = demand(sample, resource)
            if value is not None and sample.at <= now:
                values[resource][0, (sample.at - first) // SLOT] = value
    sizes = {r: np.array([s], np.float32) for r, s in SIZES.items()}
    series = Series((service.guest.uuid,), first // SLOT * STEP, values, sizes)
    said = forecast(series, models.panel(engine.settings), horizon=HOUR // SLOT * STEP, quantiles=(QUANTILE,))
    return {line.resource: line.peak for line in said}


def record_of(engine: Engine, service: Service, before: dict[str, float]) -> dict[str, tuple[float, str]]:
    found = {}
    for resource in RESOURCES:
        need = need_after_restart(
            service.guest.uuid, "micro", engine.store.restarts.of(engine.facts.name, HOUR), resource,
            before=before.get(resource), quantile=QUANTILE, limit=SIZES.get(resource),
        )  # fmt: skip
        if need is not None:
            found[resource] = need.value, f"{need.rule} of {need.learned_from}"
    return found


def lives(engine: Engine, found: list[Service], rounds: int) -> list[dict[str, Any]]:
    chance = random.Random(3)
    told: dict[str, dict[str, Any]] = {}
    cases: list[dict[str, Any]] = []
    for number in range(rounds + 1):
        began = time.time()
        for service in found:
            start(engine, service, chance)
        time.sleep(HOUR + STEADY)
        now = time.time()
        restarts.learn(engine, now, (HOUR,), HOUR)
        for service in found:
            name = service.guest.name
            own = [r for r in engine.store.restarts.of(engine.facts.name, HOUR) if r.vm_uuid == service.guest.uuid]
            before, seen = told.pop(name, None), [r for r in own if r.at > began]
            if not seen:
                say(f"{name}, start {number + 1}: the host was too busy to see enough of it")
                continue
            if before:
                cases += _outcomes(before, seen[-1])
            record = record_of(engine, service, _hour(engine, service, now))
            told[name] = {"vm": name, "restart": len(own), "rolling": rolling(engine, service, now), "record": record}
            say(f"{name}, start {number + 1} of {rounds + 1}: {_shown(own[-1])}")
        for service in found:
            vms.stop(engine, service.guest.name, force=True, seconds=10)
        time.sleep(2 * SLOT)
    return cases


def _hour(engine: Engine, service: Service, now: float) -> dict[str, float]:
    samples = engine.store.samples.latest(engine.facts.name, int(now) - HOUR, [service.guest.uuid])
    return peaks(samples)


def _outcomes(case: dict[str, Any], actual: Restart) -> list[dict[str, Any]]:
    """Of each resource that both predicted, and that was measured."""
    found = []
    for resource, (value, rule) in case["record"].items():
        if case["restart"] < OWN or resource not in actual.peak or resource not in case["rolling"]:
            continue
        peak, other = actual.peak[resource], case["rolling"][resource]
        found.append(
            {
                "case": f"{case['vm'].rpartition('-')[2]}-{case['restart']}-{resource}",
                "resource": resource,
                "actual": peak,
                "record": value,
                "rule": rule,
                "rolling": other,
                "record_pinball": pinball(peak, value, QUANTILE),
                "rolling_pinball": pinball(peak, other, QUANTILE),
            }
        )
    return found


def _shown(restart: Restart) -> str:
    return ", ".join(f"{r} {restart.peak[r]:.2f}" for r in RESOURCES if r in restart.peak)


def _remove(engine: Engine, name: str) -> None:
    try:
        vms.delete(engine, name, force=True)
    except HvctlError as e:
        say(f"{name}: {e.message}")


@contextlib.contextmanager
def _engine() -> Iterator[tuple[Engine, Path]]:
    """With a database of its own, and locks beside those of other hvctl processes."""
    with tempfile.TemporaryDirectory(prefix="hvctl-bench-", dir="/var/tmp") as folder:
        settings = Settings(
            database_url=f"sqlite:///{folder}/hvctl.db",
            run_dir=f"{folder}/run",
            collect_interval=float(SLOT),
            cpu_overcommit=1000.0,
            libvirt_deadline=30.0,
        )
        with open_engine(settings) as engine:
            yield engine, Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vms", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=14, help="restarts of each VM")
    asked = parser.parse_args()
    with _engine() as (engine, folder), contextlib.ExitStack() as made:
        found = services(engine, asked.vms, folder, made)
        with watched(engine):
            cases = lives(engine, found, asked.rounds)
    summary: dict[str, float | str] = {"restarts": float(len({c["case"].rpartition("-")[0] for c in cases}))}
    gains = []
    for resource in RESOURCES:
        own = [c for c in cases if c["resource"] == resource]
        if not own:
            continue
        record, other = (statistics.fmean(c[f"{who}_pinball"] for c in own) for who in ("record", "rolling"))
        gains.append(1 - record / other if other else 0.0)
        summary[f"pinball_gain_{resource}"] = gains[-1]
        summary[f"coverage_{resource}"] = statistics.fmean(c["actual"] <= c["record"] for c in own)
        summary[f"coverage_rolling_{resource}"] = statistics.fmean(c["actual"] <= c["rolling"] for c in own)
    if not gains:
        raise SystemExit("bench: there were too few restarts to compare anything")
    write("restarts", {"pinball_gain_vs_rolling": statistics.fmean(gains), **summary}, cases)


if __name__ == "__main__":
    main()
