"""What VMs needed after their starts is remembered; engine/expected tells by it what one will need after its next."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hvctl.decide.afterstart import HOUR, SPANS, restarts
from hvctl.engine.operate import Engine
from hvctl.model.sample import EventKind, VmEvent

LOOKED_BACK = 6 * HOUR
"""A start is found again in every run for this long, so that a node that was down for hours misses none."""


def learn(engine: Engine, now: float | None = None, spans: Sequence[int] = SPANS, lead: float = HOUR) -> str:
    """Remember every start whose spans are over, with the `lead` seconds before it; in words how many."""
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
    return f"{len(new)} spans after starts of {len(waiting)} VMs"
