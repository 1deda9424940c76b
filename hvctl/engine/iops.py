"""IOPS that VMs use, from the node's newest samples: nothing else counts them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from hvctl.decide.afterstart import demand

if TYPE_CHECKING:
    from hvctl.engine.operate import Engine

CYCLES: Final = 6.0
"""Cycles of collection for which a sample is one of now."""


def lately(engine: Engine, uuids: Sequence[str] | None = None) -> dict[str, list[int]]:
    """By uuid the requests per second of the last cycles' samples, the newest last; absent: they were not measured."""
    since = engine.clock() - CYCLES * engine.settings.collect_interval
    found: dict[str, list[int]] = {}
    for sample in engine.store.samples.latest(engine.facts.name, int(since), uuids):
        rate = demand(sample, "iops")
        if rate is not None:
            found.setdefault(sample.uuid, []).append(math.ceil(rate))
    return found
