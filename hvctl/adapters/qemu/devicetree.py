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

# Where the guest reads which slots it is to let go of, one bit each: on the machine pc, and on q35 (QEMU's
# docs/specs/acpi_pci_hotplug.rst). On the other one nobody answers, which reads as all ones.
PENDING: Final[tuple[Query, dict[str, object]]] = ("human-monitor-command", {"command-line": "i /w 0xae04"})
PENDING_ELSE: Final[tuple[Query, dict[str, object]]] = ("human-monitor-command", {"command-line": "i /w 0xcc4"})
_NOBODY: Final = 0xFFFFFFFF


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


def refuse_pending(said: Any) -> bool:
    """From an answer to PENDING: RefusedError while a guest has not let go yet of a device that it was asked for;
    whether this machine tells there. A machine reset, with which each load of device state begins, takes that device
    away, and QEMU hangs in it (seen with 7.2). Of several PCI buses the one tells that the guest asked last."""
    slots = int(str(said).rpartition("= 0x")[2].strip() or "0", 16)
    if 0 < slots < _NOBODY:
        slot = (slots & -slots).bit_length() - 1
        raise RefusedError(
            f"the guest was asked to let go of the device in slot {slot}, and has not: QEMU would hang in a load.",
            "a new start ends that: hvctl vm stop; a guest that is well again does when it is asked once more",
        )
    return slots != _NOBODY


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
