"""What a domain may use, set through libvirt: vCPUs, CPU quota and weight, block I/O, and the balloon.

Each setter acts on the running guest and on the definition, and reads back what it set.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import libvirt

from hvctl.adapters.kernel import process
from hvctl.adapters.libvirt import domainxml
from hvctl.adapters.libvirt.calls import Connection, clean, code_of, text_of
from hvctl.adapters.libvirt.domainxml_disks import disk_limit
from hvctl.adapters.libvirt.domainxml_read import percent
from hvctl.errors import GuestError, HvctlError, RefusedError
from hvctl.model.allocation import DiskLimit
from hvctl.model.vm import Accel, Balloon

_PERIOD = 100_000
# libvirt itself waits 5 s for each vCPU that it asks back; a busy guest gives it later, so we wait on.
_UNPLUG_SECONDS_EACH = 5.0
_UNPLUG_GRACE = 10.0
_PLUG_SECONDS = 30.0
_UNPLUG_REREAD = 0.5
_BALLOON_REREAD = 0.1
_BALLOON_STILL = 3.0
_BALLOON_LIMIT = 120.0


def both(domain: Any) -> tuple[int, ...]:
    """The flags to act with, one after the other: on the running guest and on the definition, as far as it has them."""
    flags = []
    if domain.isActive():
        flags.append(libvirt.VIR_DOMAIN_AFFECT_LIVE)
    if domain.isPersistent():
        flags.append(libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    return tuple(flags)


def _label(domain: Any) -> str:
    return clean(domain.name(), 80)


# --- CPU


def cpu_in_force(domain: Any, vcpus: int, described: tuple[int | None, int | None]) -> tuple[int | None, int | None]:
    """(shares, quota in percent of one CPU) as the kernel has them now; what is described of a domain that is just
    starting or ending, whose groups are not there yet or any more, or that a new libvirtd has not found again yet."""
    try:
        now = domain.schedulerParametersFlags(libvirt.VIR_DOMAIN_AFFECT_LIVE)
    except libvirt.libvirtError as e:
        if code_of(e) == libvirt.VIR_ERR_SYSTEM_ERROR or "is not mounted" in text_of(e):
            return described
        raise
    whole = percent(now.get("global_quota"), now.get("global_period"))
    each = percent(now.get("vcpu_quota"), now.get("vcpu_period"), vcpus)
    return now.get("cpu_shares"), min((q for q in (whole, each) if q is not None), default=None)


def _shares(weight: int | None) -> int:
    """libvirt's cpu_shares for a weight: cgroup v2's own scale, or v1's on which 1024 is the default."""
    weight = 100 if weight is None else weight
    return weight if process.cgroup_version() == 2 else round(weight * 1024 / 100)


def weight_of(shares: int | None) -> int | None:
    """The inverse of _shares, exact for every weight from 1 to 10000; None for the kernel's default."""
    if not shares or shares == _shares(None):
        return None
    return shares if process.cgroup_version() == 2 else max(1, min(10_000, round(shares * 100 / 1024)))


def set_weight(domain: Any, weight: int | None) -> None:
    wanted = _shares(weight)
    for flag in both(domain):
        domain.setSchedulerParametersFlags({"cpu_shares": wanted}, flag)
        found = domain.schedulerParametersFlags(flag).get("cpu_shares")
        if found != wanted:
            raise HvctlError(f"the CPU shares of {_label(domain)} are {found} after they were set to {wanted}.")


def set_quota(domain: Any, quota: int | None) -> None:
    """The limit of the whole VM; limits that somebody set for each vCPU go, or they would hold beside it."""
    wanted = (
        {"global_quota": -1} if quota is None else {"global_period": _PERIOD, "global_quota": quota * _PERIOD // 100}
    )
    for flag in both(domain):
        before = domain.schedulerParametersFlags(flag)
        if before.get("vcpu_quota", 0) > 0:
            wanted = {**wanted, "vcpu_quota": -1}
        domain.setSchedulerParametersFlags(wanted, flag)
        now = domain.schedulerParametersFlags(flag)
        found = percent(now.get("global_quota"), now.get("global_period"))
        if found != quota:
            raise HvctlError(f"the CPU quota of {_label(domain)} is {found} % after it was set to {quota} %.")


def set_vcpus(connection: Connection, uuid: str, count: int) -> None:
    """The definition follows only when the running guest did."""

    def plugged(c: Any) -> tuple[int, int, Accel]:
        domain = c.lookupByUUIDString(uuid)
        parts = domainxml.read(domain.XMLDesc(0))
        return parts.vcpus if domain.isActive() else count, parts.max_vcpus, parts.accel

    def live(c: Any) -> str | None:
        """What the guest's refusal was, if it was one: it may still comply a little later."""
        domain = c.lookupByUUIDString(uuid)
        try:
            domain.setVcpusFlags(count, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        except libvirt.libvirtError as e:
            if code_of(e) not in (libvirt.VIR_ERR_OPERATION_TIMEOUT, libvirt.VIR_ERR_OPERATION_FAILED) or (
                "state change lock" in text_of(e)
            ):
                raise
            return text_of(e)
        return None

    def definition(c: Any) -> None:
        domain = c.lookupByUUIDString(uuid)
        if domain.isPersistent():
            flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG
            if domain.vcpusFlags(flags) != count:
                domain.setVcpusFlags(count, flags | libvirt.VIR_DOMAIN_VCPU_HOTPLUGGABLE)

    now, most, accel = connection.call(f"look at {uuid}", plugged)
    if count < 1 or count > most:
        raise RefusedError(f"the VM can have 1 to {most} vCPUs, not {count}.", "hvctl vm show tells its maximum")
    if count < now and accel is Accel.TCG:
        # An emulated vCPU is never freed (seen with QEMU 7.2), so its DEVICE_DELETED never comes: QEMU has one less,
        # libvirt does not learn it, and refuses every later change of the vCPUs until the VM starts anew.
        raise GuestError(
            f"an emulated VM cannot give a vCPU back while it runs: it keeps {now}.",
            "take it offline in the guest, and limit the VM with --cpu-quota",
        )
    if now != count:
        seconds = _PLUG_SECONDS if count > now else _PLUG_SECONDS + (now - count) * _UNPLUG_SECONDS_EACH
        with connection.events(uuid, libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED) as removed:
            refusal = connection.call(f"set the vCPUs of {uuid}", live, seconds)
            now = _await_vcpus(
                lambda: connection.call(f"look at {uuid}", plugged)[0], count, removed, refusal is not None
            )
        if now != count:
            raise GuestError(
                f"the guest has {now} vCPUs after it was asked for {count}: {refusal or 'it keeps them'}.",
                "take them offline in the guest first, or use --cpu-quota",
            )
    connection.call(f"set the vCPUs of {uuid}", definition)


def _await_vcpus(read: Callable[[], int], count: int, removed: Any, late: bool) -> int:
    until = time.monotonic() + (_UNPLUG_GRACE if late else _UNPLUG_REREAD)
    while True:
        removed.clear()
        now = read()
        left = until - time.monotonic()
        if now == count or left <= 0:
            return now
        removed.wait(min(left, _UNPLUG_REREAD))


# --- disks


def set_disk_limit(domain: Any, limit: DiskLimit) -> None:
    """All of a disk's tuning is replaced: limits for reads or writes alone, which libvirt does not take beside these,
    go."""
    wanted = {f"{kind}_{unit}_sec": 0 for kind in ("read", "write") for unit in ("iops", "bytes")}
    wanted |= {f"{key}_max": 0 for key in wanted}
    wanted |= {
        "total_iops_sec": limit.iops or 0,
        "total_bytes_sec": limit.rate or 0,
        "total_iops_sec_max": limit.iops_burst or 0,
        "total_bytes_sec_max": limit.rate_burst or 0,
    }
    # Lengths that are not named stay, and QEMU refuses one without a burst: so 0, which is no length.
    seconds = limit.burst_seconds or 0
    wanted["total_iops_sec_max_length"] = seconds if limit.iops_burst else 0
    wanted["total_bytes_sec_max_length"] = seconds if limit.rate_burst else 0
    for flag in both(domain):
        domain.setBlockIoTune(limit.target, wanted, flag)
        now = domain.blockIoTune(limit.target, flag)
        found = disk_limit(limit.target, now.get)
        if (found.iops, found.rate, found.iops_burst, found.rate_burst) != (
            limit.iops, limit.rate, limit.iops_burst, limit.rate_burst,
        ):  # fmt: skip
            raise HvctlError(f"the limit of disk {limit.target} of {_label(domain)} reads back as {found}.")


# --- memory


def memory_in_force(connection: Any, uuid: str) -> dict[str, int]:
    """Bytes of an active domain's balloon as QEMU has it, by its uuid; nothing if it ended. What the XML describes
    follows an event that QEMU sends at most once a second."""
    try:
        return {uuid: int(connection.lookupByUUIDString(uuid).memoryStats()["actual"]) * 1024}
    except (libvirt.libvirtError, KeyError):
        return {}


def balloon(domain: Any) -> Balloon:
    if domain.isActive():
        try:
            return _live_balloon(domain)
        except libvirt.libvirtError:
            # One that has gone off since is no fault of who looks at all of them.
            if domain.isActive():
                raise
    return Balloon(actual=domainxml.read(domain.XMLDesc(0)).memory)


def _live_balloon(domain: Any) -> Balloon:
    stats = domain.memoryStats()
    reported = stats.get("last_update", 0)
    if not reported:
        parts = domainxml.read(domain.XMLDesc(0))
        if not parts.has_balloon:
            return Balloon(actual=parts.memory)
        # A domain that somebody else defined may never have been told to collect them.
        domain.setMemoryStatsPeriod(1, libvirt.VIR_DOMAIN_AFFECT_LIVE)

    def value(key: str) -> int | None:
        return stats[key] * 1024 if reported and key in stats else None

    return Balloon(
        actual=stats["actual"] * 1024,
        total=value("available"),
        unused=value("unused"),
        usable=value("usable"),
        age=max(0.0, time.time() - reported) if reported else None,
    )


def set_balloon(connection: Connection, uuid: str, target: int) -> int:
    """The definition follows only when the target was reached."""
    if target % 1024:
        raise RefusedError(f"a balloon's target is a whole number of KiB, not {target} bytes.")

    def ask(c: Any) -> bool:
        domain = c.lookupByUUIDString(uuid)
        most = domain.maxMemory() * 1024
        if not 0 < target <= most:
            raise RefusedError(f"the VM can have up to {most} bytes of memory, not {target}.")
        if not domain.isActive():
            return False
        domain.setMemoryFlags(target // 1024, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        return True

    def actual(c: Any) -> int:
        return int(c.lookupByUUIDString(uuid).memoryStats()["actual"]) * 1024

    def definition(c: Any) -> None:
        domain = c.lookupByUUIDString(uuid)
        if domain.isPersistent():
            domain.setMemoryFlags(target // 1024, libvirt.VIR_DOMAIN_AFFECT_CONFIG)

    reached = target
    with connection.events(uuid, libvirt.VIR_DOMAIN_EVENT_ID_BALLOON_CHANGE) as changed:
        if connection.call(f"set the balloon of {uuid}", ask):
            reached = _follow(lambda: connection.call(f"read the balloon of {uuid}", actual), target, changed)
    if reached == target:
        connection.call(f"set the memory of {uuid}", definition)
    return reached


def _follow(read: Callable[[], int], target: int, changed: Any) -> int:
    """The balloon's size once it is `target`, or has not moved for _BALLOON_STILL seconds."""
    begun = moved = time.monotonic()
    last: int | None = None
    while True:
        changed.clear()
        actual, now = read(), time.monotonic()
        if actual != last:
            last, moved = actual, now
        if actual == target or now - moved >= _BALLOON_STILL or now - begun >= _BALLOON_LIMIT:
            return actual
        changed.wait(_BALLOON_REREAD)
