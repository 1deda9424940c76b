"""libvirt answers and tells its versions, and this QEMU has what warm resets are made of."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

from hvctl.adapters.node.hostpaths import HOST, HostPaths
from hvctl.errors import HvctlError
from hvctl.model.finding import Finding, degraded, failing, ok
from hvctl.model.host import HostFacts
from hvctl.settings import Settings

COMMANDS = frozenset({
    "blockdev-add", "blockdev-del", "cont", "job-dismiss", "migrate-set-capabilities", "query-jobs", "snapshot-delete",
    "snapshot-load", "snapshot-save", "stop",
})  # fmt: skip
CAPABILITY = "x-ignore-shared"
QEMU_SECONDS = 10.0
RESETS = "warm resets and snapshots"


def _facts(settings: Settings) -> HostFacts:
    from hvctl.adapters.libvirt.host import LibvirtDomains

    domains = LibvirtDomains(settings)
    try:
        return domains.facts()
    finally:
        domains.close()


def libvirt(settings: Settings, facts: Callable[[Settings], HostFacts] = _facts) -> Finding:
    try:
        host = facts(settings)
    except HvctlError as e:
        remedy = e.hint or "hvctl host prepare --yes"
        return failing("libvirt", e.message.removesuffix("."), "everything", remedy, fixable="host prepare" in remedy)
    if not host.hypervisor_version[:1].isdigit():
        detail = f"libvirt {host.libvirt_version} answers at {host.uri} and does not tell the version of its QEMU"
        return degraded("libvirt", detail, "starting VMs, if libvirt cannot ask QEMU", "virsh version")
    return ok("libvirt", f"libvirt {host.libvirt_version} with QEMU {host.hypervisor_version} answers at {host.uri}")


def qemu(paths: HostPaths = HOST) -> Finding:
    """Asks a QEMU without a machine, over its standard streams, what it can do."""
    try:
        version, commands, capabilities = _ask(
            paths.qemu, "query-version", "query-commands", "query-migrate-capabilities"
        )
        known = {c["name"] for c in commands} | {c["capability"] for c in capabilities}
        number = ".".join(str(version["qemu"][part]) for part in ("major", "minor", "micro"))
    except FileNotFoundError:
        return failing("qemu", f"{paths.qemu} is not installed", "everything", "apt install qemu-system-x86")
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError) as e:
        return failing("qemu", f"{paths.qemu} does not answer: {e}", "everything", f"{paths.qemu} --version")
    if missing := sorted((COMMANDS | {CAPABILITY}) - known):
        detail = f"QEMU {number} does not know {', '.join(missing)}"
        return degraded("qemu", detail, RESETS, "install QEMU 6.0 or newer: apt install qemu-system-x86")
    return ok("qemu", f"QEMU {number} knows all that warm resets are made of")


def _ask(binary: str, *commands: str) -> list[Any]:
    """What QEMU returns to each command."""
    asked = "".join(json.dumps({"execute": c}) + "\n" for c in ("qmp_capabilities", *commands, "quit"))
    done = subprocess.run(
        [binary, "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S", "-qmp", "stdio"],
        input=asked.encode(),
        capture_output=True,
        timeout=QEMU_SECONDS,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return [line["return"] for line in lines if "QMP" not in line and "event" not in line][1 : 1 + len(commands)]
