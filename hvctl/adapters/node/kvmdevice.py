"""/dev/kvm and who may open it. Where QEMU's user may not, libvirt takes its knowledge of QEMU for outdated at every
question and starts QEMU again to ask: 8 to 30 s each time, seen with libvirt 9.0 on a host without udev."""

from __future__ import annotations

import grp
import os
import stat
from pathlib import Path

from hvctl.errors import UnreachableError

GROUP = "kvm"
MODE = 0o660


def closed(device: Path) -> str | None:
    """How the device is closed to QEMU's user, None if it is open to its group, or there is none to open."""
    try:
        status, group = device.stat(), grp.getgrnam(GROUP).gr_gid
    except (OSError, KeyError):
        return None
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o006 == 0o006 or (status.st_gid == group and mode & 0o060 == 0o060):
        return None
    return f"mode {mode:04o}, group {status.st_gid}"


def open_to_group(device: Path) -> None:
    """What udev does on a host that has it: group kvm may read and write."""
    try:
        os.chown(device, -1, grp.getgrnam(GROUP).gr_gid)
        device.chmod(MODE)
    except OSError as e:
        raise UnreachableError(f"{device} cannot be changed: {e.strerror}.", "run hvctl as root") from e
