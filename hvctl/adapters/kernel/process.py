"""The QEMU process behind a domain, and facts of this host, from /proc.

A pid is believed only when the process itself names the domain's UUID, and it stands with its start time, so that a
reused pid is never taken for the VM.
"""

from __future__ import annotations

import itertools
import os
import stat
from pathlib import Path

from hvctl.model.vm import Process, Region

_RUN = Path("/run/libvirt/qemu")
_PROC = Path("/proc")
_STATE = Path("/var/lib/libvirt/qemu")


def boot_id() -> str:
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def cgroup_version() -> int:
    """2 if the unified hierarchy controls CPUs here, 1 otherwise (a v2 mount without controllers is beside v1)."""
    try:
        controllers = Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()
    except OSError:
        return 1
    return 2 if "cpu" in controllers else 1


def qemu_owner() -> tuple[int, int] | None:
    """uid and gid that libvirt runs QEMU as: at its start it gives them its state directory."""
    try:
        found = _STATE.stat()
    except OSError:
        return None
    return found.st_uid, found.st_gid


def start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat, in clock ticks since boot; None if there is no such process."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # The second field is a name in parentheses that may hold anything, parentheses too.
    return int(text.rpartition(")")[2].split()[19])


def find(name: str, uuid: str) -> Process | None:
    """The QEMU process of a running domain; None if it cannot be seen or is not surely that domain's."""
    try:
        pid = int((_RUN / f"{name}.pid").read_text().strip())
    except (OSError, ValueError):
        return None
    started = start_time(pid)
    if started is None or not _names_uuid(pid, uuid) or start_time(pid) != started:
        return None
    return Process(pid=pid, start_time=started, boot_id=boot_id())


def _names_uuid(pid: int, uuid: str) -> bool:
    try:
        arguments = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(a == b"-uuid" and b == uuid.encode() for a, b in itertools.pairwise(arguments))


def ram_files(process: Process, size: int) -> tuple[Region, ...]:
    """The files that the process maps shared, sorted by name: all of its RAM, or nothing if they do not add
    up to `size` bytes, or if one of the paths is another file by now. QEMU names such a file after its backend."""
    try:
        lines = (_PROC / str(process.pid) / "maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ()
    if start_time(process.pid) != process.start_time:
        return ()
    found: dict[str, Region] = {}
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or not fields[1].startswith("rw-s") or fields[5] in found:
            continue
        path, inode = Path(fields[5]), int(fields[4])
        try:
            status = path.stat()
        except OSError:
            continue
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
        if (status.st_ino, device) == (inode, fields[3]) and stat.S_ISREG(status.st_mode):
            found[fields[5]] = Region(path.name, fields[5], status.st_size)
    regions = sorted(found.values(), key=lambda r: r.name)
    return tuple(regions) if sum(r.size for r in regions) == size else ()


def on_tmpfs(path: str) -> bool:
    """Whether a file lies on a tmpfs; False also for one that is not there."""
    try:
        return _filesystem(Path(path).stat().st_dev) == "tmpfs"
    except OSError:
        return False


def _filesystem(device: int) -> str | None:
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in (_PROC / "self/mountinfo").read_text(errors="replace").splitlines():
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return None
