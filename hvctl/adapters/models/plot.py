"""matplotlib's one door: a forecast as a picture, with what was before it and, where it is known, what came; and what
policies of a replay held. It draws into a file and needs no display."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from hvctl.errors import HvctlError, UsageError
from hvctl.forecasting.series import F32, F64, STEP

SUFFIXES: Final = (".svg", ".png")


@dataclass(frozen=True, slots=True)
class Panel:
    """One resource. past ends at the moment of the forecast, came begins there; both are five-minute means. middle and
    high are the forecast peaks at quantiles 0.5 and `quantile` over `horizon` seconds that begin `gap` seconds later;
    mean is the forecast mean."""

    resource: str
    unit: str
    past: F32
    came: F32
    middle: float
    high: float
    mean: float
    quantile: float
    horizon: int
    gap: int
    answered: str


def check(path: Path) -> None:
    """UsageError unless the name says what kind of picture it is to be."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path} names no kind of picture.", "end the name with .svg or .png")


def draw(path: Path, title: str, at: float, panels: Sequence[Panel]) -> None:
    """HvctlError if the file cannot be written. at: seconds since 1970 of the forecast."""
    with _figure(path, title, len(panels)) as axes:
        for axis, panel in zip(axes, panels, strict=True):
            _panel(axis, panel)
        shown = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
        axes[-1].set_xlabel(f"hours before and after {shown} UTC")


@contextmanager
def _figure(path: Path, title: str, rows: int) -> Iterator[Any]:
    """The axes, one below the other; the file is written when they were drawn on."""
    check(path)
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The same picture for the same figures: without this an SVG holds the time and random names.
    with mpl.rc_context({"svg.hashsalt": "hvctl", "font.size": 8}):
        figure = Figure(figsize=(9, 2.1 * rows + 0.6), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title)
        yield figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as e:
            raise HvctlError(f"the picture {path} cannot be written: {e.strerror}.", "name another file") from e


def _panel(axis: Any, panel: Panel) -> None:
    hour = STEP / 3600
    first, last = panel.gap / 3600, (panel.gap + panel.horizon) / 3600
    axis.plot([(i - len(panel.past)) * hour for i in range(len(panel.past))], panel.past, color="0.35", lw=0.8)
    axis.fill_between([first, last], panel.middle, panel.high, color="tab:blue", alpha=0.25, lw=0)
    axis.hlines(panel.high, first, last, color="tab:blue", label=f"peak, quantile {panel.quantile:g}")
    axis.hlines(panel.mean, first, last, color="tab:blue", linestyles="dotted", label="mean")
    if len(panel.came):
        # The plain name for what was measured, so that nobody takes it for a part of the forecast.
        axis.plot([i * hour for i in range(len(panel.came))], panel.came, color="tab:red", lw=1.0, label="what came")
    axis.axvline(0, color="0.7", lw=0.6)
    axis.set_ylim(bottom=0)
    axis.set_ylabel(f"{panel.resource} ({panel.unit})")
    axis.set_title(panel.answered, fontsize=7, loc="right")
    axis.legend(loc="upper left", fontsize=7, frameon=False)


@dataclass(frozen=True, slots=True)
class Curve:
    """values: one for each five minutes; filled: what the others are compared with."""

    name: str
    values: F64
    filled: bool = False


@dataclass(frozen=True, slots=True)
class Stack:
    title: str
    curves: tuple[Curve, ...]


def compare(path: Path, title: str, stacks: Sequence[Stack]) -> None:
    """Curves over days, one picture below the other. HvctlError if the file cannot be written."""
    with _figure(path, title, len(stacks)) as axes:
        for axis, stack in zip(axes, stacks, strict=True):
            for curve in stack.curves:
                days = [i * STEP / 86400 for i in range(len(curve.values))]
                if curve.filled:
                    axis.fill_between(days, 0, curve.values, color="0.8", lw=0, label=curve.name)
                else:
                    axis.plot(days, curve.values, lw=0.9, label=curve.name)
            axis.set_ylim(bottom=0)
            axis.set_ylabel(stack.title)
        axes[-1].set_xlabel("days")
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, loc="outside lower center", fontsize=7, frameon=False, ncols=len(labels))
