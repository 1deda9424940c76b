"""What VMs needed after their starts is remembered; engine/expected tells by it what one will need after its next, and
what was predicted for a return is compared with it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hvctl.decide.afterstart import HOUR, SPANS, forecast_errors, restarts
from hvctl.engine.operate import Engine
from hvctl.model.restart import Restart
from hvctl.model.sample import UNITS, EventKind, VmEvent
from hvctl.units import format_duration

LOOKED_BACK = 6 * HOUR
"""A start is found again in every run for this long, so that a node that was down for hours misses none."""
COMPARED = 7 * 24 * HOUR
"""Returns of so many seconds are compared with what was predicted for them."""


def learn(engine: Engine, now: float | None = None, spans: Sequence[int] = SPANS, lead: float = HOUR) -> str:
    """Remember every start whose spans are over, with the `lead` seconds before it; in words how many, and
    how far off the forecast of a return was."""
    now = time.time() if now is None else now
    host, store = engine.facts.name, engine.store
    rows = store.samples.events(host, now - LOOKED_BACK - HOUR)
    events = [VmEvent(r["vm_uuid"], r["vm_name"], EventKind(r["kind"]), r["at"]) for r in rows]
    since = now - LOOKED_BACK
    known = {(r.vm_uuid, r.at, r.span) for r in store.restarts.of(host, since=since)}
    # Samples are read of those alone of which something is still to be learned: a start is met again for hours.
    starts = [(e.vm_uuid, e.at) for e in events if e.kind is EventKind.START and e.at > since]
    waiting = {u for u, at in starts for span in spans if at + span <= now and (u, at, span) not in known}
    if not waiting:
        return f"nothing new of {len(starts)} starts"
    samples = store.samples.latest(host, int(since - HOUR), sorted(waiting))
    images = {vm.uuid: vm.record.image for vm in engine.host.domains.list() if vm.record and vm.record.image}
    found = restarts((e for e in events if e.vm_uuid in waiting), samples, images, now, spans, lead)
    new = [r for r in found if r.at > since and (r.vm_uuid, r.at, r.span) not in known]
    store.restarts.add(host, new)
    told = [
        f"; {one['vm']} needed {in_words([one])} in the first {format_duration(one['span'])} after its return"
        for one in compared(engine, new, now)
    ]
    return f"{len(new)} spans after starts of {len(waiting)} VMs{''.join(told)}"


def returns(engine: Engine, uuid: str | None = None) -> list[dict[str, Any]]:
    """How far off the forecasts of the last week's returns were (of one VM): a row for each return, span and resource,
    the newest return first; ratio is needed / predicted. What is not known yet, or nobody forecast, is absent."""
    record = engine.store.restarts.of(engine.facts.name, since=engine.clock() - COMPARED)
    return compared(engine, [r for r in record if uuid in (None, r.vm_uuid)], engine.clock())


def compared(engine: Engine, record: Sequence[Restart], now: float) -> list[dict[str, Any]]:
    found = []
    every = engine.store.pool.away(engine.facts.name, returned=True) if record else ()
    for away in reversed(every):
        if away.returned_at is None or away.returned_at <= now - COMPARED:
            continue
        found += [
            {
                "vm": away.vm_name,
                "how": away.rung.value,
                "returned_at": away.returned_at,
                "span": e.span,
                "resource": e.resource,
                "unit": UNITS[e.resource],
                "predicted": e.predicted,
                "needed": e.needed,
                "ratio": e.ratio,
            }
            for e in forecast_errors(away, record)
        ]
    return found


def last_return(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of these rows those of the newest return and its longest span."""
    newest = [r for r in rows if r["returned_at"] == rows[0]["returned_at"]]
    return [r for r in newest if r["span"] == newest[-1]["span"]]


def in_words(rows: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(f"{r['resource']} {r['needed']:.2f} of {r['predicted']:.2f} {r['unit']} predicted" for r in rows)
