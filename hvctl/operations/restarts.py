"""What VMs needed after their starts is remembered, and what one will need after its next."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hvctl.decide.afterstart import HOUR, SPANS, restarts
from hvctl.decide.restarts import need_after_restart
from hvctl.engine.operate import Engine
from hvctl.model.restart import RestartNeed
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
    started = {e.vm_uuid for e in events if e.kind is EventKind.START and e.at > since}
    if not started:
        return "no VM started lately"
    known = {(r.vm_uuid, r.at, r.span) for r in store.restarts.of(host, since=since)}
    samples = store.samples.latest(host, int(since - HOUR), sorted(started))
    images = {vm.uuid: vm.record.image for vm in engine.host.domains.list() if vm.record and vm.record.image}
    found = restarts((e for e in events if e.vm_uuid in started), samples, images, now, spans, lead)
    new = [r for r in found if r.at > since and (r.vm_uuid, r.at, r.span) not in known]
    store.restarts.add(host, new)
    return f"{len(new)} spans after starts of {len(started)} VMs"


def need(
    engine: Engine, uuid: str, image: str | None, resource: str, *, span: int = SPANS[0], quantile: float = 0.95,
    before: float | None = None, limit: float | None = None,
) -> RestartNeed | None:  # fmt: skip
    """The peak of a resource in the first `span` seconds after a VM's next start, as its, its image's and the fleet's
    earlier ones teach; None where there were too few. before is the peak of its last hour, limit its size."""
    record = engine.store.restarts.of(engine.facts.name, span)
    return need_after_restart(uuid, image, record, resource, before=before, quantile=quantile, limit=limit)
