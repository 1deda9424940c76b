"""A disk as its guest uses it, through the guest agent: what is mounted, letting it go before a reset, having it after.

A guest keeps what it read from a disk, so one that was put back under it is seen only after the last user closed it or
its cache was dropped. All of it is the guest's word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from hvctl.adapters.guest import agent
from hvctl.adapters.guest.agent import Call
from hvctl.errors import GuestError

SECONDS: Final = 30.0
_LIMIT: Final = 256  # of file systems and mounts of one guest: more than that is no honest answer
_DEVICE: Final = re.compile(r"/dev/[A-Za-z0-9][A-Za-z0-9_-]{0,30}")
_SYSTEM: Final = ("/", "/usr")
_SHOWN: Final = 1 << 18
_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of the guest's /proc/mounts."""

    device: str
    place: str
    kind: str
    options: str


def mounted(call: Call, seconds: float = 5.0) -> frozenset[str] | None:
    """Words for the disks with a mounted file system: the guest's device name, the serial and the PCI address
    ("0000:00:04.0"), as far as the guest tells them. None: it does not tell of every file system what it lies on. What
    uses a disk without a file system (swap, a database, an open file) is not in it."""
    answer = call("guest-get-fsinfo", {}, seconds)
    if not isinstance(answer, list) or len(answer) > _LIMIT:
        raise GuestError("the guest agent's answer to guest-get-fsinfo is not a list of file systems.")
    words: set[str] = set()
    for system in answer:
        disks = system.get("disk") if isinstance(system, dict) else None
        if not isinstance(disks, list) or len(disks) > _LIMIT or not all(isinstance(d, dict) for d in disks):
            raise GuestError("the guest agent's answer to guest-get-fsinfo is not a list of file systems.")
        if not disks:
            return None
        for disk in disks:
            found = _words(disk)
            if not found:
                return None
            words |= found
    return frozenset(words)


def used(call: Call, seconds: float = 5.0) -> list[tuple[frozenset[str], float]]:
    """Of each file system that lies on one disk alone, that disk's words as in `mounted`, and the share of it that is
    used, 0 to 1."""
    answer = call("guest-get-fsinfo", {}, seconds)
    if not isinstance(answer, list) or len(answer) > _LIMIT:
        raise GuestError("the guest agent's answer to guest-get-fsinfo is not a list of file systems.")
    found = []
    for system in answer:
        disks = system.get("disk") if isinstance(system, dict) else None
        used, total = (system.get(n) if isinstance(system, dict) else None for n in ("used-bytes", "total-bytes"))
        if not (isinstance(disks, list) and len(disks) == 1 and isinstance(disks[0], dict)):
            continue
        if type(used) is int and type(total) is int and 0 <= used <= total < 2**62 and total:
            found.append((frozenset(_words(disks[0])), used / total))
    return found


def system(call: Call, seconds: float = 5.0) -> frozenset[str]:
    """Words, as in `mounted`, for the disks that the guest runs from; those that it does not tell of are not in it."""
    answer = call("guest-get-fsinfo", {}, seconds)
    found: set[str] = set()
    for mount in answer if isinstance(answer, list) and len(answer) <= _LIMIT else ():
        disks = mount.get("disk") if isinstance(mount, dict) and mount.get("mountpoint") in _SYSTEM else None
        for disk in disks[:_LIMIT] if isinstance(disks, list) else ():
            found |= _words(disk) if isinstance(disk, dict) else set()
    return frozenset(found)


def _words(disk: dict[str, Any]) -> set[str]:
    words = set()
    device, serial, pci = disk.get("dev"), disk.get("serial"), disk.get("pci-controller")
    if isinstance(device, str) and _DEVICE.fullmatch(device):
        words.add(device.removeprefix("/dev/"))
    if isinstance(serial, str) and 0 < len(serial) <= 256:
        words.add(serial)
    if isinstance(pci, dict):
        parts = [p for key in ("domain", "bus", "slot", "function") if isinstance(p := pci.get(key), int)]
        # Minus ones where the guest does not know.
        if len(parts) == 4 and all(0 <= p <= 0xFFFF for p in parts):
            words.add("{:04x}:{:02x}:{:02x}.{:x}".format(*parts))
    return words


def device(call: Call, target: str, serial: str | None, seconds: float = SECONDS) -> str:
    """The guest's name of a disk: the one with its serial, or else of the host's name for it, if that is there."""
    script = 'for d in /sys/block/*; do echo "${d##*/} $(cat "$d/serial" 2>/dev/null)"; done'
    found = {}
    for line in _output(call, ["/bin/sh", "-c", script], seconds).decode(errors="replace").splitlines():
        name, _, its = line.partition(" ")
        found[name] = its.strip()
    # virtio shows the first 20 bytes of a serial.
    names = [n for n, its in found.items() if its and its == (serial or "")[:20]] if serial else []
    if not names and target in found and not (serial and found[target]):
        names = [target]
    if len(names) != 1 or not _DEVICE.fullmatch(f"/dev/{names[0]}"):
        raise GuestError(f"the guest shows no disk that is surely {target}.", "hvctl vm exec VM -- ls /sys/block")
    return f"/dev/{names[0]}"


def release(call: Call, device: str, seconds: float = SECONDS) -> tuple[Mount, ...]:
    """Unmount everything on a disk and its partitions and write back what the guest keeps of it; the mounts that were
    there, for `regain`. GuestError: somebody still has it, and what was unmounted is mounted again."""
    gone: list[Mount] = []
    try:
        # The last one first: it may lie on an earlier one.
        for mount in reversed(_mounts(call, device, seconds)):
            _output(call, ["/bin/umount", mount.place], seconds)
            gone.insert(0, mount)
        _settle(call, device, seconds)
    except GuestError:
        _mount(call, gone, seconds)
        raise
    return tuple(gone)


def regain(call: Call, device: str, mounts: Sequence[Mount], seconds: float = SECONDS) -> None:
    """Have the guest forget what it read from a disk, look at its partitions again, and mount again what was mounted.
    GuestError: the guest has not got all of it."""
    _settle(call, device, seconds)
    _mount(call, mounts, seconds)


def _settle(call: Call, device: str, seconds: float) -> None:
    """Nothing of the disk is in the guest's memory after it. The kernel reads the partitions again only of a disk that
    nobody has mounted, swaps to or built upon, in whatever namespace: so this also tells whether it was let go."""
    _output(call, ["/sbin/blockdev", "--flushbufs", device], seconds)
    _output(call, ["/sbin/blockdev", "--rereadpt", device], seconds)


def _mounts(call: Call, device: str, seconds: float) -> list[Mount]:
    if not _DEVICE.fullmatch(device):
        raise GuestError("the guest names a disk that is not one.")
    own = re.compile(rf"{re.escape(device)}(p?[0-9]+)?")
    found = []
    for line in _output(call, ["/bin/cat", "/proc/mounts"], seconds).splitlines():
        fields = [_ESCAPE.sub(lambda m: bytes([int(m[1], 8) & 0xFF]), f) for f in line.split(b" ")]
        if len(fields) < 4:
            continue
        words = [f.decode(errors="surrogateescape") for f in fields[:4]]
        if own.fullmatch(words[0]) and words[1].startswith("/"):
            found.append(Mount(*words))
    if len(found) > _LIMIT:
        raise GuestError(f"the guest has {device} mounted {len(found)} times.")
    return found


def _mount(call: Call, mounts: Sequence[Mount], seconds: float) -> None:
    for mount in mounts:
        words = ["/bin/mount", "-t", mount.kind, "-o", mount.options, mount.device, mount.place]
        _output(call, words, seconds)


def _output(call: Call, argv: Sequence[str], seconds: float) -> bytes:
    done = agent.run(call, argv, seconds=seconds, max_bytes=_SHOWN)
    if done.status != 0 or done.truncated:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise GuestError(f"the guest's {argv[0].rpartition('/')[2]} failed: {said[-1] if said else 'it says nothing'}.")
    return done.stdout
