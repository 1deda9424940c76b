"""The cpu controller of control groups, v1 or v2, by limiting a group of our own that holds no process."""

from __future__ import annotations

import os
from pathlib import Path

from hvctl.adapters.node.hostpaths import HOST, HostPaths
from hvctl.model.finding import Finding, failing, ok

LOST = "CPU quota and weight of VMs (allocate --cpu-quota, --cpu-weight)"
V1 = {"cpu.cfs_quota_us": "50000", "cpu.shares": "512"}
V2 = {"cpu.max": "50000 100000", "cpu.weight": "50"}
MOUNT_V1 = "mount -t cgroup -o cpu cgroup"


def probe(paths: HostPaths = HOST) -> Finding:
    root = paths.cgroup
    controllers = root / "cgroup.controllers"
    if controllers.exists():
        return _unified(root, controllers.read_text().split())
    for name in ("cpu", "cpu,cpuacct"):
        if (root / name / "cpu.shares").exists():
            fault = _limit_own_group(root / name, V1)
            if fault is None:
                return ok("cgroups", "v1, the cpu controller takes quota and shares")
            return failing("cgroups", f"v1: {fault}", LOST, f"{MOUNT_V1} {root / name}")
    return failing("cgroups", f"no cpu controller under {root}", LOST, f"{MOUNT_V1} {root / 'cpu'}")


def _unified(root: Path, available: list[str]) -> Finding:
    if "cpu" not in available:
        return failing(
            "cgroups",
            f"v2 without the cpu controller (there are: {', '.join(available) or 'none'})",
            LOST,
            "boot without cgroup_disable=cpu and without a v1 hierarchy that holds the cpu controller",
        )
    if "cpu" not in (root / "cgroup.subtree_control").read_text().split():
        return ok("cgroups", "v2, the cpu controller is there and not in use yet: libvirt enables it for its guests")
    fault = _limit_own_group(root, V2)
    if fault is None:
        return ok("cgroups", "v2, the cpu controller takes quota and weight")
    return failing("cgroups", f"v2: {fault}", LOST, f"echo +cpu > {root / 'cgroup.subtree_control'}")


def _limit_own_group(parent: Path, limits: dict[str, str]) -> str | None:
    group = parent / f"hvctl-probe-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as e:
        return f"a group cannot be made: {e.strerror}"
    try:
        return unmet(group, limits)
    finally:
        group.rmdir()


def unmet(group: Path, limits: dict[str, str]) -> str | None:
    """What a group does not take of `limits` (file to text), None if all of them read back as written."""
    for name, wanted in limits.items():
        try:
            with (group / name).open("r+") as stream:
                stream.write(wanted)
            found = (group / name).read_text().strip()
        except OSError as e:
            return f"{name}: {e.strerror}"
        if found != wanted:
            return f"{name} reads {found} after {wanted} was written"
    return None
