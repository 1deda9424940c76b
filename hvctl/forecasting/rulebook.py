"""Which rule, with which margin, answers for a resource, a target and a length of history: the composite of the best
rules. It is what models have to beat, and what answers where they have not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from hvctl.errors import UsageError
from hvctl.forecasting.margin import Kind, Known, Margin, tune
from hvctl.forecasting.series import F32, I64

LENGTHS: Final = (12, 72, 288, 2016)  # slots: 1 h, 6 h, 1 day, 7 days


@dataclass(frozen=True, slots=True)
class Choice:
    rule: str
    margin: Margin
    loss: float = 0.0

    def __str__(self) -> str:
        return f"{self.rule} {self.margin.kind.value} {self.margin.amount:.4g}"


# Where no book was tuned for a resource or quantile: simple, and the upper one high rather than low.
DEFAULT: Final = Choice("max_of_hour_and_clock", Margin(Kind.TIMES, 1.25))
MEDIAN: Final = Choice("aim_p50_24h", Margin())


@dataclass(frozen=True, slots=True)
class Rulebook:
    """key (resource-target-quantile) to the choice for each length of history."""

    choices: Mapping[str, Mapping[int, Choice]]

    def of(self, key: str, history: int) -> Choice:
        """The choice for the longest length that is not longer than the history (slots)."""
        found = self.choices.get(key, {})
        fitting = [length for length in found if length <= max(history, LENGTHS[0])]
        if not fitting:
            return MEDIAN if key.endswith("-0.5") else DEFAULT
        return found[max(fitting)]

    def answer(self, key: str, found: Mapping[str, F32], history: I64, known: Known, floor: float) -> F32:
        """[rows], each by the rule for its history, from what every rule says."""
        told = np.zeros(len(history), np.float32)
        length = lengths(history)
        for value in np.unique(length):
            rows = np.flatnonzero(length == value)
            choice = self.of(key, int(value))
            told[rows] = choice.margin.apply(found[choice.rule][rows], known.take(rows), floor)
        return told

    def dump(self) -> dict[str, dict[str, list[str | float]]]:
        return {
            key: {str(h): [c.rule, c.margin.kind.value, c.margin.amount] for h, c in sorted(lengths.items())}
            for key, lengths in sorted(self.choices.items())
        }


def load_book(document: Mapping[str, Mapping[str, Iterable[str | float]]]) -> Rulebook:
    """UsageError for what `dump` did not write."""
    try:
        return Rulebook(
            {
                key: {int(h): Choice(str(r), Margin(Kind(str(k)), float(a))) for h, (r, k, a) in found.items()}
                for key, found in document.items()
            }
        )
    except (TypeError, ValueError) as e:
        raise UsageError("the rule book of a model card cannot be read.", "hvctl model list") from e


def lengths(history: I64) -> I64:
    """The largest of LENGTHS that fits into each history (the smallest one for what is shorter)."""
    at = np.searchsorted(np.array(LENGTHS), history, side="right") - 1
    found: I64 = np.array(LENGTHS)[np.maximum(at, 0)]
    return found


def best(actual: F32, found: Mapping[str, F32], quantile: float, scale: F32, known: Known, floor: float) -> Choice:
    """The rule and margin with the lowest pinball loss."""
    tuned = (Choice(name, *tune(actual, v, quantile, scale, known, floor)) for name, v in found.items())
    return min(tuned, key=lambda c: c.loss)


def composite(
    actual: F32, found: Mapping[str, F32], quantile: float, scale: F32, known: Known, floor: float, history: I64
) -> dict[int, Choice]:
    """The best rule and margin for each length of history that occurs."""
    chosen = {}
    length = lengths(history)
    for value in np.unique(length):
        rows = np.flatnonzero(length == value)
        part = {name: v[rows] for name, v in found.items()}
        chosen[int(value)] = best(actual[rows], part, quantile, scale[rows], known.take(rows), floor)
    return chosen
