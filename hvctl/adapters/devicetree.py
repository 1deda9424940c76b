"""The devices, vCPUs and memory of a QEMU process in words: what a snapshot is bound to beside the disks."""

from __future__ import annotations

from hvctl.adapters.qmp import Qmp
from hvctl.errors import RefusedError


def read(qmp: Qmp) -> tuple[str, ...]:
    """One string per device, sorted; a hotplug or unplug of anything changes them."""
    words = []
    for path in ("/machine/peripheral", "/machine/peripheral-anon"):
        words += [
            f"{d['name']} {d['type'].removeprefix('child<').removesuffix('>')}"
            for d in qmp.execute("qom-list", {"path": path})
            if d["type"].startswith("child<")
        ]
    for cpu in qmp.execute("query-hotpluggable-cpus"):
        if "qom-path" in cpu:
            words.append("vcpu " + " ".join(f"{k}={v}" for k, v in sorted(cpu["props"].items())))
    words += [f"memory {m.get('id', '')} {m['size']}" for m in qmp.execute("query-memdev")]
    words += [f"module {m['data'].get('id', '')} {m['data']['size']}" for m in qmp.execute("query-memory-devices")]
    return tuple(sorted(words))


def refuse_other_memory(qmp: Qmp, ram_size: int) -> None:
    """Shared memory is left out of the device state, so there must be none but the file that is copied."""
    shared = [m for m in qmp.execute("query-memdev") if m["share"]]
    if [m["size"] for m in shared] != [ram_size]:
        names = ", ".join(str(m.get("id")) for m in shared) or "none"
        raise RefusedError(
            f"the VM's RAM is not one shared file of {ram_size} bytes (shared memory: {names}).",
            "remove memory modules and ivshmem devices",
        )
