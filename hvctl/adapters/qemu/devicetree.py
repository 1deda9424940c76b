"""The devices, vCPUs and memory of a QEMU process in words: what a snapshot is bound to beside the disks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from hvctl.adapters.qemu.qmp import Qmp, Query
from hvctl.errors import GuestError, RefusedError
from hvctl.model.snapshot import Range

QUESTIONS: Final[tuple[tuple[Query, dict[str, object]], ...]] = (
    ("qom-list", {"path": "/machine/peripheral"}),
    ("qom-list", {"path": "/machine/peripheral-anon"}),
    ("query-hotpluggable-cpus", {}),
    ("query-memdev", {}),
    ("query-memory-devices", {}),
)


def words(answers: Sequence[Any]) -> tuple[str, ...]:
    """One string per device, sorted, from the answers to QUESTIONS; a hotplug or unplug of anything changes them."""
    *devices, cpus, backends, modules = answers
    found = [f"{name} {kind}" for answer in devices for name, kind in children(answer)]
    for cpu in cpus:
        if "qom-path" in cpu:
            found.append("vcpu " + " ".join(f"{k}={v}" for k, v in sorted(cpu["props"].items())))
    found += [f"memory {m.get('id', '')} {m['size']}" for m in backends]
    found += [f"module {m['data'].get('id', '')} {m['data']['size']}" for m in modules]
    return tuple(sorted(found))


def children(answer: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Names and kinds of the devices in an answer to qom-list."""
    return [
        (d["name"], d["type"].removeprefix("child<").removesuffix(">"))
        for d in answer
        if d["type"].startswith("child<")
    ]


def refuse_other_memory(qmp: Qmp, regions: dict[str, int]) -> None:
    """Shared memory is left out of the device state, so there must be none but the files that are copied: their names
    and sizes in bytes."""
    shared = {str(m.get("id")): m["size"] for m in qmp.execute("query-memdev") if m["share"]}
    # libvirt calls a module dimm0 and so its file, and the backend memdimm0.
    named = {f"mem{name}" if f"mem{name}" in shared else name: size for name, size in regions.items()}
    if shared != named:
        raise RefusedError(
            f"the shared memory of the VM ({', '.join(sorted(shared)) or 'none'}) is not the files that hold its RAM"
            f" ({', '.join(sorted(regions))}).",
            "remove ivshmem devices",
        )


def host_address(qmp: Qmp, guest_physical: int) -> int:
    """Where QEMU has a guest-physical address; RefusedError if there is no RAM. Only the monitor for people tells."""
    said = str(qmp.execute("human-monitor-command", {"command-line": f"gpa2hva {guest_physical:#x}"}))
    try:
        return int(said.rsplit(" is ", 1)[1].strip(), 16)
    except (IndexError, ValueError) as e:
        raise RefusedError(
            f"the guest has no RAM at {guest_physical:#x}.", "hvctl vm exec VM -- cat /proc/iomem"
        ) from e


def host_range(qmp: Qmp, asked: Range) -> tuple[int, int]:
    """First and last-plus-one address in QEMU of a range of guest RAM; RefusedError if it is not one piece there."""
    try:
        first, last = host_address(qmp, asked.start), host_address(qmp, asked.end - 1)
    except GuestError as e:
        raise RefusedError(f"this QEMU does not tell where guest RAM is: {e.message}") from e
    if last - first != asked.end - 1 - asked.start:
        raise RefusedError(f"{asked.start:#x} to {asked.end:#x} is not one piece of guest RAM.", "name each piece")
    return first, last + 1
