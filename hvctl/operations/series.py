"""The node's record as a series: what forecasts are made from, what models are trained on, and files of it in and out.
Only whole five-minute rows are read; a slot without a row is a gap, never a zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from hvctl.engine.operate import Engine
from hvctl.errors import HvctlError, NotFoundError, UsageError
from hvctl.forecasting.series import F32, F64, STEP, Series
from hvctl.model.sample import DEMANDS, EventKind

WEEK: Final = 7 * 86400.0
MIB: Final = 1 << 20
LATE: Final = 3
"""Slots that the roll-up may be behind: so many at the end of the record are not there yet, and no gap."""

_READ: Final = 86400  # seconds of rows in memory as Python's objects at a time
_SUMS: Final = {r: (tuple(f"{m}_mean" for m in measures), factor) for r, (measures, factor) in DEMANDS.items()}
_SIZES: Final = {"cpu": ("vcpus", 1.0), "memory": ("memory", 1.0 / MIB)}
_COLUMNS: Final = tuple(c for parts, _ in _SUMS.values() for c in parts) + tuple(c for c, _ in _SIZES.values())


@dataclass(frozen=True, slots=True)
class Moved:
    """What an import or an export moved: rows (one of a VM and five minutes), of so many VMs. left_out: rows that lie
    in the future or are older than what the node keeps."""

    rows: int
    vms: int
    left_out: int = 0


def history(
    engine: Engine, uuids: Sequence[str] | None = None, seconds: float = WEEK, until: float | None = None
) -> Series:
    """The last `seconds` before `until` (now) of these VMs, in their order, or of all that have rows, by UUID. It ends
    with the newest row that there can be; sizes are the most that a VM was allocated in that time."""
    end = int(engine.clock() if until is None else until) // STEP * STEP
    start = end - max(1, round(seconds / STEP)) * STEP
    parts = [
        _columns(engine.store.samples.series(at, min(at + _READ, end), host=engine.facts.name, uuids=uuids,
                                             columns=_COLUMNS))
        for at in range(start, end, _READ)
    ]  # fmt: skip
    newest = max((int(slots.max()) for _, slots, _ in parts if len(slots)), default=end)
    if until is None and end - newest - STEP <= LATE * STEP:
        end = min(end, newest + STEP)
    vms = tuple(uuids) if uuids is not None else tuple(sorted({u for names, _, _ in parts for u in names}))
    values, sizes = _grids(vms, start, (end - start) // STEP, parts)
    return Series(vms, start, values, sizes, _starts(engine, vms, start))


_Part = tuple[list[str], Any, dict[str, F64]]


def _columns(rows: dict[str, list[Any]]) -> _Part:
    found = {name: np.array(rows[name], np.float64) for name in _COLUMNS}
    return rows["uuid"], np.array(rows["at"], np.int64), found


def _grids(vms: Sequence[str], start: int, slots: int, parts: Sequence[_Part]) -> tuple[dict[str, F32], dict[str, F32]]:
    place = {uuid: i for i, uuid in enumerate(vms)}
    values = {r: np.full((len(vms), slots), np.nan, np.float32) for r in _SUMS}
    sizes = {r: np.full(len(vms), np.nan, np.float32) for r in _SIZES}
    for names, at, columns in parts:
        vm = np.array([place[n] for n in names], np.int64)
        slot = (at - start) // STEP
        for resource, (summed, factor) in _SUMS.items():
            values[resource][vm, slot] = sum((columns[c] for c in summed), np.float64(0)) * factor
        for resource, (column, factor) in _SIZES.items():
            np.fmax.at(sizes[resource], vm, (columns[column] * factor).astype(np.float32))
    return values, sizes


def _starts(engine: Engine, vms: Sequence[str], since: float) -> F64:
    found = np.full(len(vms), np.nan)
    place = {uuid: i for i, uuid in enumerate(vms)}
    for event in engine.store.samples.events(engine.facts.name, since):
        if event["kind"] in (EventKind.START, EventKind.RESTART) and event["vm_uuid"] in place:
            found[place[event["vm_uuid"]]] = event["at"]
    return found


# --- files


def export_file(engine: Engine, path: Path, since: float, until: float | None = None) -> Moved:
    """NotFoundError if nothing was measured in that time; HvctlError if the file cannot be written."""
    from hvctl.adapters.models import seriesfile

    end = engine.clock() if until is None else until
    if since >= end:
        raise UsageError("the time to export ends before it begins.", "--since 7d --until 1d")
    series = history(engine, None, end - since, until)
    if not series.vms:
        raise NotFoundError("nothing was measured in that time.", "hvctl node run; hvctl job run roll-up")
    try:
        seriesfile.write(path, series)
    except OSError as e:
        raise HvctlError(f"{path} cannot be written: {e.strerror or e}.", "name another file") from e
    return Moved(int(_measured(series).sum()), len(series.vms))


def import_file(engine: Engine, path: Path) -> Moved:
    """Take rows of VMs from a file; a row that is there already stays. UsageError if nothing of it would be kept."""
    from hvctl.adapters.models import seriesfile

    series = seriesfile.read(path)
    days, now = engine.settings.rolled_days, engine.clock()
    vm, slot = np.nonzero(_measured(series))
    at = series.start + slot * STEP
    kept = (at > now - days * 86400) & (at + STEP <= now)
    if not kept.any():
        raise UsageError(
            f"{path} holds nothing from the last {days:g} days, which is what a node keeps.",
            "raise rolled_days, or train on the file itself: hvctl model train --data FILE",
        )
    vm, slot = vm[kept], slot[kept]
    columns = _rows(series, vm, slot)
    columns["uuid"] = [series.vms[i] for i in vm]
    columns["at"] = at[kept].tolist()
    known = engine.store.samples.observed(engine.facts.name)
    names = {u: known[u]["name"] if u in known else u for u in series.vms}
    rows = engine.store.samples.put_series(engine.facts.name, names, columns)
    return Moved(rows, len(set(columns["uuid"])), int((~kept).sum()))


def _measured(series: Series) -> Any:
    known = np.zeros((len(series.vms), series.slots), np.bool_)
    for found in series.values.values():
        known |= np.isfinite(found)
    return known


def _rows(series: Series, vm: Any, slot: Any) -> dict[str, list[Any]]:
    """A sum of two columns comes back as the first of them, and nothing in the second."""
    columns: dict[str, list[Any]] = {}
    for resource, found in series.values.items():
        (first, *others), factor = _SUMS[resource]
        columns[first] = _plain(found[vm, slot] / factor)
        for other in others:
            columns[other] = [None if v is None else 0.0 for v in columns[first]]
    for resource, (column, factor) in _SIZES.items():
        columns[column] = _plain(series.size(resource)[vm] / factor)
    return columns


def _plain(values: Any) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]
