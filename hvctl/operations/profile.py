"""profile show: how a VM behaves, as one document, put together from the record of the node, its events, what it needed
after its returns beside what was predicted, and what it is forecast to need after the next interruption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from hvctl.adapters.store.samples import JOB_TYPE
from hvctl.decide.rollup import SLOT
from hvctl.engine.operate import Engine
from hvctl.errors import HvctlError
from hvctl.model.sample import DEMANDS, EventKind
from hvctl.model.vm import Vm
from hvctl.operations import restarts
from hvctl.operations.forecast import GAP, Question, forecast_vm, found_vm
from hvctl.operations.series import WEEK

MIB: Final = 1 << 20
_HISTORY: Final = (EventKind.INTERRUPTION, EventKind.RESTART)
_CYCLES: Final = 12  # of collection, after which the newest sample is not one of now
# The measures whose sum each is, and the factor from their unit to the one of its name.
_MEASURES: Final = {
    "cpu_cores": (DEMANDS["cpu"][0], 1.0),
    "memory_bytes": (DEMANDS["memory"][0], 1.0),
    "iops": (DEMANDS["iops"][0], 1.0),
    "disk_bytes_per_second": (DEMANDS["disk"][0], 1.0),
    "network_bits_per_second": (DEMANDS["network"][0], 8.0),
}


def show(engine: Engine, ref: str) -> dict[str, Any]:
    """NotFoundError. Over the last week: average (of five-minute means) and peak (of samples) of each measure; None is
    not known."""
    uuid, name, vm = found_vm(engine, ref)
    host, now = engine.facts.name, engine.clock()
    known = engine.store.samples.observed(host).get(uuid, {})
    recent = engine.store.samples.latest(host, int(now - _CYCLES * engine.settings.collect_interval), [uuid])
    latest = recent[-1] if recent else None
    use, last_row = _use(engine, uuid, now)
    moments = [t for t in (last_row, None if latest is None else latest.at) if t is not None]
    running = vm is not None and vm.state.active
    return {
        "instance_id": uuid,
        "name": name,
        "host": host,
        "state": None if vm is None else vm.state.value,
        "job_type": _job_type(vm) or known.get("job_type"),
        **use,
        "uptime_seconds": latest.uptime if latest is not None and running else None,
        "connections": latest.connections if latest is not None and running else None,
        "interruptions": _events(engine, uuid),
        "returns": restarts.returns(engine, uuid),
        "after_interruption": _after(engine, ref),
        "updated_at": max(moments, default=None),
    }


def _job_type(vm: Vm | None) -> str | None:
    return None if vm is None else vm.labels.get(JOB_TYPE)


def _use(engine: Engine, uuid: str, now: float) -> tuple[dict[str, Any], int | None]:
    """Averages and peaks, and the end of the newest row. A peak of a sum is at most the sum of the peaks; that of a row
    from elsewhere, which has none, is at least its mean."""
    columns = [f"{part}_{s}" for parts, _ in _MEASURES.values() for part in parts for s in ("mean", "max")]
    rows = engine.store.samples.series(int(now - WEEK), int(now), host=engine.facts.name, uuids=[uuid], columns=columns)
    found = {}
    for name, (parts, factor) in _MEASURES.items():
        average = [_mean(rows[f"{part}_mean"]) for part in parts]
        most = [_highest(rows[f"{part}_max"], rows[f"{part}_mean"]) for part in parts]
        peaks = [p for row in zip(*most, strict=True) if (p := _total(row)) is not None]
        whole = _total(average)
        found[name] = {
            "average": None if whole is None else whole * factor,
            "peak": max(peaks) * factor if peaks else None,
        }
    return found, max(rows["at"]) + SLOT if rows["at"] else None


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _highest(peaks: Sequence[float | None], means: Sequence[float | None]) -> list[float | None]:
    return [mean if peak is None else peak for peak, mean in zip(peaks, means, strict=True)]


def _total(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if len(known) == len(values) else None


def _events(engine: Engine, uuid: str) -> list[dict[str, Any]]:
    """Interruptions and returns, the oldest first."""
    return [
        {"at": e["at"], "kind": e["kind"], "detail": e["detail"], "operation": e["operation"]}
        for e in engine.store.samples.events(engine.facts.name, 0, uuid)
        if e["kind"] in _HISTORY
    ]


def _after(engine: Engine, ref: str) -> dict[str, Any]:
    """CPU cores, memory and network after an interruption of half an hour, with who says so; None where nobody can."""
    predicted: dict[str, Any] = {"gap": GAP, "cpu_cores": None, "memory_bytes": None, "network_bits_per_second": None}
    try:
        told = forecast_vm(engine, ref, Question(gap=GAP, after=True))
    except HvctlError as e:
        return predicted | {"quantile": None, "answered": {}, "reason": e.message}
    names = {"cpu": ("cpu_cores", 1.0), "memory": ("memory_bytes", MIB), "network": ("network_bits_per_second", 1e6)}
    answered = {}
    for line in told.lines:
        if line.resource in names and line.history:
            name, factor = names[line.resource]
            predicted[name] = line.peak * factor
            answered[name] = f"{line.answered.value}: {line.rule}"
    return predicted | {"quantile": told.question.quantile, "answered": answered, "reason": None}
