"""pyarrow's one door: series from and to Parquet and CSV files. The columns are those of the public VM traces, so that
an operator's own export, a trace and a training set are one format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from hvctl.errors import NotFoundError, UsageError
from hvctl.forecasting.series import F32, I64, STEP, Series

# resource: the columns whose sum is its demand, and the factor to its unit. (1 KB/s is 0.008 Mbit/s.)
COLUMNS: Final[Mapping[str, tuple[tuple[str, ...], float]]] = {
    "cpu": (("cpu_cores",), 1.0),
    "memory": (("mem_active_mb",), 1.0),
    "disk": (("disk_read_kbs", "disk_write_kbs"), 1.0),
    "network": (("net_rx_kbs", "net_tx_kbs"), 0.008),
    "iops": (("iops",), 1.0),
}
SIZES: Final[Mapping[str, str]] = {
    "cpu": "cores",
    "memory": "mem_cap_mb",
    "disk": "disk_cap_kbs",
    "network": "net_cap_kbs",
}
_CELLS: Final = 1 << 30
_HINT: Final = "columns: vm, slot (of 5 minutes), cores, mem_cap_mb, cpu_cores, mem_active_mb, disk_*_kbs, net_*_kbs"


def read(path: Path) -> Series:
    """NotFoundError; UsageError for what is no such file. Slots that nobody measured, and those of a VM without
    cores (it was off), are gaps."""
    table = _table(path)
    if "cpu_pct" in table.column_names:
        return _lists(path, table)
    return _rows(path, table)


def write(path: Path, series: Series) -> None:
    """A Parquet file, or CSV by its name; one row for each VM and slot in which anything was measured."""
    known = np.zeros((len(series.vms), series.slots), np.bool_)
    for found in series.values.values():
        known |= np.isfinite(found)
    vm, slot = np.nonzero(known)
    names = pa.DictionaryArray.from_arrays(pa.array(vm.astype(np.int32)), pa.array(list(series.vms), pa.string()))
    columns: dict[str, Any] = {"vm": names.cast(pa.string()), "slot": slot + series.start // STEP}
    for resource, name in SIZES.items():
        size = series.size(resource)[vm] / COLUMNS[resource][1]
        if np.isfinite(size).any():
            columns[name] = np.nan_to_num(size).astype(np.float32)
    for resource, found in series.values.items():
        parts, factor = COLUMNS[resource]
        columns[parts[0]] = found[vm, slot] / np.float32(factor)
        for other in parts[1:]:
            columns[other] = np.where(np.isfinite(found[vm, slot]), np.float32(0), np.float32(np.nan))
    table = pa.table(columns)
    if path.suffix == ".csv":
        pacsv.write_csv(table, path)
    else:
        pq.write_table(table, path, compression="zstd")


def _table(path: Path) -> Any:
    if not path.is_file():
        raise NotFoundError(f"there is no file {path}.", _HINT)
    try:
        if path.suffix == ".csv":
            return pacsv.read_csv(path)
        return pq.read_table(path, use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as e:
        line = (str(e).splitlines() or [type(e).__name__])[0]
        raise UsageError(f"{path} is neither Parquet nor CSV that can be read: {line}", _HINT) from e


def _column(path: Path, table: Any, name: str) -> F32:
    try:
        return np.asarray(table[name].to_numpy(), np.float32)
    except (TypeError, ValueError) as e:
        raise UsageError(f"the column {name} of {path} does not hold numbers.", _HINT) from e


def _rows(path: Path, table: Any) -> Series:
    there = set(table.column_names)
    resources = [r for r, (parts, _) in COLUMNS.items() if there.issuperset(parts)]
    if not {"vm", "slot"} <= there or not resources:
        raise UsageError(f"{path} holds no demand of VMs: its columns are {', '.join(sorted(there))}.", _HINT)
    if not table.num_rows:
        raise UsageError(f"{path} holds no rows.", _HINT)
    vms, vm = _ids(table["vm"])
    try:
        slot: I64 = np.asarray(table["slot"].to_numpy(), np.int64)
    except (TypeError, ValueError) as e:
        raise UsageError(f"the column slot of {path} does not hold whole numbers.", _HINT) from e
    # The grid starts at a midnight, so that slots keep their time of day.
    first = int(slot.min()) // 288 * 288
    span = int(slot.max()) + 1 - first
    if span * len(vms) > _CELLS:
        raise UsageError(f"{path} spans {span} slots of {len(vms)} VMs: more than can be held.", "export fewer days")
    off = np.zeros(len(vm), np.bool_)
    sizes: dict[str, F32] = {}
    for resource, name in SIZES.items():
        if name not in there:
            continue
        size = _column(path, table, name) * np.float32(COLUMNS[resource][1])
        largest = np.zeros(len(vms), np.float32)
        np.maximum.at(largest, vm, np.nan_to_num(size))
        sizes[resource] = np.where(largest > 0, largest, np.float32(np.nan))
        if resource == "cpu":
            off = size <= 0
    values = {}
    for resource in resources:
        parts, factor = COLUMNS[resource]
        found = sum((_column(path, table, p) for p in parts), np.float32(0)) * np.float32(factor)
        grid = np.full((len(vms), span), np.nan, np.float32)
        grid[vm, slot - first] = np.where(off | (found < 0), np.float32(np.nan), found)
        values[resource] = grid
    return Series(vms, first * STEP, values, sizes)


def _ids(column: Any) -> tuple[tuple[str, ...], I64]:
    names, index = np.unique(column.to_numpy(zero_copy_only=False), return_inverse=True)
    return tuple(str(n) for n in names), index.astype(np.int64)


def _lists(path: Path, table: Any) -> Series:
    """One list of CPU percents for each VM and day, as CoMon's PlanetLab records: each day is a VM of its own, because
    the days do not follow one another."""
    try:
        rows = [np.asarray(v, np.float32) for v in table["cpu_pct"].to_pylist()]
        days = [str(d) for d in table["day"].to_pylist()]
        vms = tuple(f"{vm}@{day}" for vm, day in zip(table["vm"].to_pylist(), days, strict=True))
    except (KeyError, TypeError, ValueError) as e:
        raise UsageError(f"{path} has a column cpu_pct, but not lists with a day and a vm.", _HINT) from e
    cpu = np.full((len(rows), max((len(r) for r in rows), default=0)), np.nan, np.float32)
    for i, row in enumerate(rows):
        cpu[i, : len(row)] = row / 100
    return Series(vms, 0, {"cpu": cpu}, {"cpu": np.ones(len(rows), np.float32)})
