"""A node's record of five-minute rows as the roll-up would have written it, from a synthetic fleet."""

from __future__ import annotations

from typing import Any

import numpy as np

from hvctl.engine.operate import Engine
from hvctl.forecasting.series import STEP, Series

NOW = 1_800_000_000.0 + 60
"""A minute into a slot: the slot before it is the newest that is rolled up."""
MIB = 1 << 20


def put(engine: Engine, series: Series, names: dict[str, str] | None = None, end: float = NOW) -> None:
    """The series' last slot becomes the newest one before `end`; the clock of the engine stands there."""
    engine.clock = lambda: end
    start = int(end) // STEP * STEP - series.slots * STEP
    vm, slot = np.nonzero(np.any([np.isfinite(v) for v in series.values.values()], axis=0))
    columns: dict[str, Any] = {
        "uuid": [series.vms[i] for i in vm],
        "at": [start + int(s) * STEP for s in slot],
        "vcpus": [float(series.size("cpu")[i]) for i in vm],
        "memory": [float(series.size("memory")[i]) * MIB for i in vm],
    }
    for resource, column, factor in (
        ("cpu", "cpu_mean", 1),
        ("memory", "memory_used_mean", MIB),
        ("disk", "disk_read_bytes_mean", 1000),
        ("network", "net_rx_bytes_mean", 125_000),
    ):
        if resource in series.values:
            found = series.values[resource][vm, slot]
            columns[column] = [float(v) * factor if np.isfinite(v) else None for v in found]
    for resource, other in (("disk", "disk_write_bytes_mean"), ("network", "net_tx_bytes_mean")):
        if resource in series.values:
            columns[other] = [0.0] * len(vm)
    if "cpu" in series.values:
        columns["cpu_max"] = [None if v is None else 1.5 * v for v in columns["cpu_mean"]]
    engine.store.samples.put_series(engine.facts.name, names or {}, columns)
