"""Who besides root and QEMU could read or change what hvctl keeps: state, locks, snapshots, and every folder on the
way to them."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hvctl.adapters.images.imagestore import IMAGE_LINK
from hvctl.adapters.node.hostpaths import HOST, HostPaths
from hvctl.adapters.node.hostprep import folders
from hvctl.adapters.node.qemuconf import setting
from hvctl.model.finding import Finding, failing, ok
from hvctl.settings import Settings

NAME = "permissions"
PREPARE = "hvctl host prepare --yes"
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
OTHERS_READ = stat.S_IRGRP | stat.S_IROTH
OTHERS_PASS = stat.S_IXGRP | stat.S_IXOTH
SHOWN = 3

# Path, what is wrong with it, and the command that mends it.
Fault = tuple[Path, str, str]


def probe(settings: Settings, paths: HostPaths = HOST) -> Finding:
    faults = list(_faults(settings, paths))
    if not faults:
        return ok(NAME, "state, locks and snapshots belong to root and QEMU, and nobody else can change or read them")
    detail = "; ".join(f"{path}: {what}" for path, what, _ in faults[:SHOWN])
    if len(faults) > SHOWN:
        detail += f"; and {len(faults) - SHOWN} more"
    remedy = faults[0][2]
    return failing(NAME, detail, "the secrecy or the integrity of guests", remedy, fixable=remedy == PREPARE)


def _faults(settings: Settings, paths: HostPaths) -> Iterator[Fault]:
    roots = [Path(d) for d in (settings.state_dir, settings.run_dir, settings.ram_dir)]
    for parent in sorted({p for root in roots for p in root.parents}):
        yield from _parent_faults(parent)
    owners = {os.geteuid(), *_qemu_owner(paths)}
    tree = _Tree(dict(folders(settings)), owners, settings.images_dir, settings.vms_dir)
    for folder in tree.modes:
        if not os.path.lexists(folder):
            yield folder, "is missing", PREPARE
    for root in roots:
        yield from tree.faults(root)


def _parent_faults(folder: Path) -> Iterator[Fault]:
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISLNK(status.st_mode):
        yield folder, "is a symbolic link", f"name the real folder in the configuration: realpath {folder}"
    elif status.st_uid not in (0, os.geteuid()):
        yield folder, f"belongs to user {status.st_uid}", f"chown root {folder}"
    elif status.st_mode & OTHERS_WRITE and not status.st_mode & stat.S_ISVTX:
        yield folder, f"mode {_mode(status)} lets others replace what is in it", f"chmod go-w {folder}"


@dataclass(frozen=True, slots=True)
class _Tree:
    """What may be in hvctl's folders: modes are those of the folders it makes itself, owners the users who may own
    something there; what is under `public` may be read by everybody."""

    modes: Mapping[Path, int]
    owners: set[int]
    public: Path
    vms: Path

    def _image_link(self, path: Path) -> bool:
        """What storage makes in the folder of each VM, for the image that it boots from."""
        return path.name == IMAGE_LINK and path.parent.parent == self.vms and path.readlink().parent == self.public

    def faults(self, path: Path, closed: bool = False) -> Iterator[Fault]:
        """Of a path and all below it. closed: others cannot pass a folder above it, so its own mode is no matter."""
        try:
            status = path.lstat()
            inside = sorted(path.iterdir()) if stat.S_ISDIR(status.st_mode) else []
        except FileNotFoundError:
            return
        if (fault := self._fault(path, status, closed)) is not None:
            yield fault
        for child in inside:
            yield from self.faults(child, closed or not status.st_mode & OTHERS_PASS)

    def _fault(self, path: Path, status: os.stat_result, closed: bool) -> Fault | None:
        mode = status.st_mode
        if stat.S_ISLNK(mode):
            if self._image_link(path):
                return None
            return path, "is a symbolic link", f"look where it leads and remove it: ls -l {path}"
        if path in self.modes:
            if not stat.S_ISDIR(mode):
                return path, "is not a folder", f"look at it and move it away: ls -ld {path}"
            if (_mode(status), status.st_uid) != (f"{self.modes[path]:04o}", os.geteuid()):
                return path, f"mode {_mode(status)}, owner {status.st_uid} instead of {self.modes[path]:04o}", PREPARE
            return None
        if status.st_uid not in self.owners:
            return path, f"belongs to user {status.st_uid}", f"find out why, then chown root {path}"
        if path.is_relative_to(self.public) and status.st_uid != os.geteuid():
            return path, f"belongs to user {status.st_uid}, who could change what every VM boots", f"chown root {path}"
        if closed:
            return None
        if mode & OTHERS_WRITE:
            return path, f"mode {_mode(status)} lets others write", f"chmod go-w {path}"
        if stat.S_ISREG(mode) and mode & OTHERS_READ and not path.is_relative_to(self.public):
            return path, f"mode {_mode(status)} lets others read", f"chmod go-r {path}"
        return None


def _mode(status: os.stat_result) -> str:
    return f"{stat.S_IMODE(status.st_mode):04o}"


def _qemu_owner(paths: HostPaths) -> set[int]:
    """The user that libvirt runs QEMU as: qemu.conf's, or Debian's."""
    name = (setting(paths.qemu_conf, "user") or "libvirt-qemu").removeprefix("+")
    try:
        return {int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid}
    except KeyError:
        return set()
