"""forecast: what a VM will need, while it runs or after an interruption, and who says so. It changes nothing, and it
has an answer whatever becomes of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from hvctl import codec
from hvctl.decide.needs import of_span
from hvctl.decide.restarts import need_after_restart
from hvctl.engine.expected import last_hour, restarts_of
from hvctl.engine.operate import Engine
from hvctl.errors import NotFoundError, RefusedError, UsageError
from hvctl.forecasting.forecast import HORIZONS, forecast
from hvctl.forecasting.panel import Panel
from hvctl.forecasting.series import STEP, UNITS, Series
from hvctl.forecasting.spread import HIGHEST, LOWEST
from hvctl.model.forecast import Answerer, Forecast
from hvctl.model.restart import Restart
from hvctl.model.vm import Vm
from hvctl.operations import compare
from hvctl.operations import model as models
from hvctl.operations.series import history

GAP: Final = 1800
LONGEST_GAP: Final = 7 * 86400
_SHOWN: Final = 24 * 3600 // STEP  # slots of the past in a picture


@dataclass(frozen=True, slots=True)
class Question:
    """horizon is 1800 or 3600 seconds, which begin `gap` seconds after `at` (seconds since 1970; None: now). after: the
    VM starts anew before them."""

    horizon: int = 3600
    gap: int = 0
    quantile: float = 0.95
    after: bool = False
    at: float | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """The answer to a question about one VM: made_at is the end of what was seen; lines are of the four resources, came
    what came of each where that is known, as peak and mean."""

    vm: str
    uuid: str
    question: Question
    made_at: int
    series: Series
    panel: Panel
    lines: tuple[Forecast, ...]
    came: dict[str, tuple[float, float]]

    def document(self) -> dict[str, Any]:
        lines = []
        for line in self.lines:
            peak, mean = self.came.get(line.resource, (None, None))
            lines.append(codec.dump(line) | {"actual_peak": peak, "actual_mean": mean})
        asked = {"horizon": self.question.horizon, "gap": self.question.gap, "quantile": self.question.quantile}
        after = {"after_interruption": self.question.after}
        return {"vm": self.vm, "uuid": self.uuid, "made_at": self.made_at, **asked, **after, "resources": lines}


def panel_of(engine: Engine, vms: Sequence[str]) -> Panel:
    """Everybody who may answer here about these VMs, with what this node's own record says of the models in use."""
    panel = models.panel(engine.settings)
    known = compare.learned(engine, panel, vms)
    return replace(panel, standings=known.standings(), margins=known.margins(vms), coverages=known.coverages())


def found_vm(engine: Engine, ref: str) -> tuple[str, str, Vm | None]:
    """UUID, name and the VM; None: it is not on this host any more, or only its record was imported."""
    try:
        vm = engine.host.domains.get(ref)
    except NotFoundError:
        for uuid, known in engine.store.samples.observed(engine.facts.name).items():
            if ref in (uuid, known["name"]):
                return uuid, known["name"], None
        raise
    return vm.uuid, vm.name, vm


def forecast_vm(engine: Engine, ref: str, question: Question) -> Told:
    """NotFoundError; UsageError for what is never forecast; RefusedError before anything was measured."""
    _check(question)
    if question.at is not None and question.at > engine.clock():
        raise UsageError("nothing is known of that time yet.", "--at names a time of the past")
    uuid, name, vm = found_vm(engine, ref)
    series = history(engine, [uuid], until=question.at)
    if not any(np.isfinite(v).any() for v in series.values.values()):
        raise RefusedError(
            f"nothing was measured of {name} in the week before: a forecast needs five-minute rows.",
            "hvctl node run measures; the first row is there after ten minutes (hvctl job list)",
        )
    panel = panel_of(engine, series.vms)
    said = forecast(series, panel, horizon=question.horizon, gap=question.gap, quantiles=(question.quantile,))
    lines = tuple(said)
    if question.after:
        image = vm.record.image if vm and vm.record else None
        hour = last_hour(engine, uuid, engine.clock() if question.at is None else question.at)
        record = of_span(restarts_of(engine), question.horizon)
        lines = tuple(after_restart(record, line, image, series, hour.get(line.resource)) for line in lines)
    made_at = series.start + series.slots * STEP
    return Told(name, uuid, question, made_at, series, panel, lines, _came(engine, uuid, made_at, question))


def _check(question: Question) -> None:
    if question.horizon not in HORIZONS:
        raise UsageError(f"a horizon of {question.horizon} s is not forecast.", "--horizon 30m, or 60m")
    if not LOWEST <= question.quantile <= HIGHEST:
        raise UsageError(f"a quantile of {question.quantile:g} is not forecast.", f"write {LOWEST:g} to {HIGHEST:g}")
    if not 0 <= question.gap <= LONGEST_GAP:
        raise UsageError(f"a gap of {question.gap} s is not forecast.", "write 0s to 7d")


def after_restart(
    record: list[Restart], rolling: Forecast, image: str | None, series: Series, before: float | None
) -> Forecast:
    """The need after a restart as earlier ones tell it, where that is more; otherwise the rolling forecast, which knows
    nothing of what a boot costs. record: of one span; before: the largest sample of the last hour."""
    size = float(series.size(rolling.resource)[0])
    need = need_after_restart(
        rolling.vm, image, record, rolling.resource,
        before=before, quantile=rolling.quantile, limit=None if np.isnan(size) else size,
    )  # fmt: skip
    why = rolling.reason.rstrip(".")
    if need is None:
        return replace(rolling, reason=f"{why}; too few restarts are recorded, so a boot's cost is not in it")
    seen = f"{need.restarts} restarts of {need.learned_from}"
    if need.value <= rolling.peak:
        return replace(rolling, reason=f"{why}; {seen} ask for no more than {need.value:.3g}")
    return replace(
        rolling, peak=need.value, answered=Answerer.RESTARTS, rule=need.rule, coverage=None,
        reason=f"{seen} ask for more than the rolling forecast of {rolling.peak:.3g}",
    )  # fmt: skip


def _window(engine: Engine, uuid: str, made_at: int, end: int) -> Series | None:
    until = min(engine.clock(), end)
    return history(engine, [uuid], until - made_at, until) if until - made_at >= STEP else None


def _came(engine: Engine, uuid: str, made_at: int, question: Question) -> dict[str, tuple[float, float]]:
    """Peak and mean over the horizon, once it is over and three quarters of it were measured."""
    end = made_at + question.gap + question.horizon
    if end > engine.clock():
        return {}
    seen = history(engine, [uuid], question.horizon, end)
    found = {}
    for resource, values in seen.values.items():
        known = values[0][np.isfinite(values[0])]
        if len(known) >= 0.75 * question.horizon / STEP:
            found[resource] = (float(known.max()), float(known.mean()))
    return found


def plot(engine: Engine, told: Told, path: Path) -> None:
    """A picture of it: the day before, the band from the median to the quantile, and what came so far."""
    from hvctl.adapters.models.plot import Panel as Picture
    from hvctl.adapters.models.plot import draw

    asked = told.question
    after = _window(engine, told.uuid, told.made_at, told.made_at + asked.gap + 2 * asked.horizon)
    medians = forecast(told.series, told.panel, horizon=asked.horizon, gap=asked.gap, quantiles=(0.5,))
    pictures = []
    for line, median in zip(told.lines, medians, strict=True):
        came = np.empty(0, np.float32) if after is None else after.values[line.resource][0]
        past = told.series.values[line.resource][0, -_SHOWN:]
        pictures.append(
            Picture(
                line.resource, UNITS[line.resource], past, came, min(median.peak, line.peak), line.peak, line.mean,
                line.quantile, line.horizon, line.gap, f"{line.answered.value}: {line.rule}",
            )
        )  # fmt: skip
    draw(path, f"{told.vm}: forecast of the next {asked.horizon // 60} minutes", told.made_at, pictures)
