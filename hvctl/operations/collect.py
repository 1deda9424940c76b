"""Measuring: a cycle of the collector, the roll-up, and how fast a VM dirties its memory."""

from __future__ import annotations

import time
from typing import Any

from hvctl.decide.rollup import cutoffs
from hvctl.engine.collect import Collector, Cycle
from hvctl.engine.operate import Engine
from hvctl.errors import UsageError

RUNS_DAYS = 7.0
"""Days that runs of jobs are kept."""

LONGEST_MEASURE = 60


def cycle(collector: Collector) -> Cycle:
    return collector.cycle()


def roll_up(engine: Engine, now: float | None = None) -> str:
    """Roll up every slot that is over, and remove what is older than raw_hours and rolled_days; what was done."""
    now = time.time() if now is None else now
    host, settings, samples = engine.facts.name, engine.settings, engine.store.samples
    # The samples of a slot's last cycle may still be on their way into the database.
    made = samples.roll_up(host, now - 2 * settings.collect_interval)
    gone = samples.prune(host, *cutoffs(now, settings.raw_hours, settings.rolled_days))
    gone += engine.store.jobs.prune(host, now - RUNS_DAYS * 86400)
    gone += engine.store.guards.prune(host, now - settings.rolled_days * 86400)
    return f"{made} rows of five minutes, {gone} old rows removed"


def dirty_rate(engine: Engine, ref: str, seconds: int) -> dict[str, Any]:
    """Bytes of its RAM that a VM dirties per second, measured over whole seconds."""
    if not 1 <= seconds <= LONGEST_MEASURE:
        raise UsageError(f"{seconds} s is not a time to measure.", f"write 1 to {LONGEST_MEASURE}")
    vm = engine.host.domains.get(ref)
    rate = engine.host.meter.dirty_rate(vm.uuid, seconds)
    return {"vm": vm.name, "uuid": vm.uuid, "seconds": seconds, "dirty_bytes_per_second": rate}
