"""The need of a VM right after its next restart, learned from its earlier ones. Several plain rules are run over the
record as if each restart were still to come, and the one that would have lost least so far answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist, fmean, stdev
from typing import Final

from hvctl.model.restart import Restart, RestartNeed

OWN, OF_IMAGE, OF_FLEET = 3, 5, 10
"""How many restarts of the VM itself, of its image, of the fleet it takes before they are believed."""
REMEMBERED: Final = 40
MARGINS: Final = (1.0, 1.05, 1.1, 1.2, 1.35, 1.6, 2.0)
LEAST: Final = 1e-6  # so that a resource that was idle has a logarithm

Rule = Callable[[Sequence[float], Sequence[float | None], float | None, float], float | None]
"""From the peaks so far, the peak of the hour before each, that of the last hour, and the quantile."""


def _largest_of(count: int) -> Rule:
    def rule(peaks: Sequence[float], _: Sequence[float | None], __: float | None, ___: float) -> float:
        return max(peaks[-count:])

    return rule


def _log_normal(peaks: Sequence[float], _: Sequence[float | None], __: float | None, quantile: float) -> float | None:
    """Wider by Student's sqrt(1 + 1/n): the mean is a guess, too."""
    if len(peaks) < 3:
        return None
    logs = [math.log(max(p, LEAST)) for p in peaks]
    spread = stdev(logs) * math.sqrt(1 + 1 / len(logs))
    return math.exp(fmean(logs) + NormalDist().inv_cdf(quantile) * spread)


def _quantile(peaks: Sequence[float], _: Sequence[float | None], __: float | None, quantile: float) -> float:
    """The ceil((n + 1) q)-th smallest, as in split conformal prediction (Vovk 2005), or else the largest."""
    return sorted(peaks)[min(math.ceil((len(peaks) + 1) * quantile), len(peaks)) - 1]


def _above_before(
    peaks: Sequence[float], before: Sequence[float | None], now: float | None, quantile: float
) -> float | None:
    """The peak of the last hour, times what the restarts took more than the hour before them."""
    ratios = [p / max(r, LEAST) for p, r in zip(peaks, before, strict=True) if r is not None]
    if now is None or not ratios:
        return None
    return now * _quantile(ratios, (), None, quantile)


RULES: Final[dict[str, Rule]] = {
    "last restart": _largest_of(1),
    "largest of 3 restarts": _largest_of(3),
    "largest of 10 restarts": _largest_of(10),
    "quantile of restarts": _quantile,
    "log-normal of restarts": _log_normal,
    "last hour times the restarts' ratio": _above_before,
}


def pinball(actual: float, predicted: float, quantile: float) -> float:
    """Koenker and Bassett 1978; in the unit of its arguments."""
    missing = actual - predicted
    return max(quantile * missing, (quantile - 1) * missing)


def need_after_restart(
    vm_uuid: str,
    image: str | None,
    record: Sequence[Restart],
    resource: str,
    *,
    before: float | None = None,
    quantile: float = 0.95,
    limit: float | None = None,
) -> RestartNeed | None:
    """The peak of `resource` after the next start of a VM; None where the record is too short for any rule.

    record is of one span, in any order. before is the peak of the VM's last hour, limit its size: a VM cannot need
    more."""
    measured = sorted((r for r in record if resource in r.peak), key=lambda r: r.at)[-10 * REMEMBERED :]
    sources = (
        ("this VM", OWN, [r for r in measured if r.vm_uuid == vm_uuid]),
        ("its image", OF_IMAGE, [r for r in measured if image is not None and r.image == image]),
        ("the fleet", OF_FLEET, measured),
    )
    for who, least, found in sources:
        if len(found) >= least:
            kept = found[-REMEMBERED:]
            value, rule, loss = _best(kept, resource, before, quantile)
            value = value if limit is None else min(value, limit)
            return RestartNeed(value, quantile, rule, who, len(kept), loss)
    return None


def _best(restarts: Sequence[Restart], resource: str, now: float | None, quantile: float) -> tuple[float, str, float]:
    """What the rule with the least loss so far says, its name and that loss. Ties go to the first and least margin."""
    peaks = [r.peak[resource] for r in restarts]
    hours = [r.before.get(resource) for r in restarts]
    best: tuple[float, str, float] | None = None
    for name, rule in RULES.items():
        answer = rule(peaks, hours, now, quantile)
        if answer is None:
            continue
        told = [rule(peaks[:n], hours[:n], hours[n], quantile) for n in range(1, len(peaks))]
        for margin in MARGINS:
            losses = [pinball(p, t * margin, quantile) for p, t in zip(peaks[1:], told, strict=True) if t is not None]
            if losses and (best is None or fmean(losses) < best[2]):
                best = (answer * margin, name if margin == 1.0 else f"{name} x {margin:g}", fmean(losses))
    assert best is not None, "the last restart always has a loss once there are two"
    return best
