"""The record that hvctl keeps in a domain's metadata. Whoever may edit the domain may have written it, so it is
believed only as far as it could be a promise."""

from __future__ import annotations

from typing import Any

from hvctl.codec import load_json
from hvctl.errors import HvctlError
from hvctl.model.allocation import Record

HVCTL = "urn:hvctl:vm:1"


def record_of(root: Any) -> Record | None:
    """None also for a record that cannot be read: such a VM counts as one that hvctl never touched."""
    found = root.findtext(f"metadata/{{{HVCTL}}}vm")
    if not found:
        return None
    try:
        record = load_json(Record, found)
    except HvctlError:
        return None
    return record if _usable(record) else None


def _usable(record: Record) -> bool:
    """Whether everything it promises can be a promise: anybody who may edit a domain may have written it, and a
    negative one would let the host promise more than it has."""
    a = record.allocation
    limits = [a.cpu_quota, a.cpu_weight]
    limits += [v for n in a.nics for v in (n.inbound, n.outbound)]
    limits += [v for d in a.disks for v in (d.iops, d.rate, d.iops_burst, d.rate_burst, d.burst_seconds)]
    numbers = all(0 <= v < 2**53 for v in (a.memory, *limits) if v is not None)
    return 1 <= a.vcpus <= 4096 and a.memory > 0 and numbers and 0 <= record.priority <= 1000
