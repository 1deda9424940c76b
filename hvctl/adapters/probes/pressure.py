"""PSI: how long tasks waited for CPU, memory and disk, as the kernel counts it."""

from __future__ import annotations

import re

from hvctl.adapters.node.hostpaths import HOST, HostPaths
from hvctl.model.finding import Finding, degraded, ok

RESOURCES = ("cpu", "memory", "io")
_SOME = re.compile(r"^some avg10=(\d+\.\d+) avg60=\d+\.\d+ avg300=\d+\.\d+ total=\d+$", re.MULTILINE)


def probe(paths: HostPaths = HOST) -> Finding:
    shown: list[str] = []
    for resource in RESOURCES:
        file = paths.proc / "pressure" / resource
        try:
            found = _SOME.search(file.read_text())
        except OSError as e:
            return _without(f"{file}: {e.strerror}")
        if not found:
            return _without(f"{file} is not in the kernel's format")
        shown.append(f"{resource} {found[1]} %")
    return ok("psi", f"waited in the last 10 s: {', '.join(shown)}")


def _without(detail: str) -> Finding:
    return degraded(
        "psi",
        detail,
        "the host's contention as the kernel counts it",
        "boot with psi=1 on the kernel's command line (CONFIG_PSI)",
    )
