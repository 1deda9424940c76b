"""Overlays and state folders of VMs on the host: ports.Storage for the local file system."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Sequence
from pathlib import Path

from hvctl.adapters.disks import diskplace, diskspace
from hvctl.adapters.disks.diskfiles import sync
from hvctl.adapters.guest import pulse
from hvctl.adapters.images.imagestore import IMAGE_LINK
from hvctl.adapters.qemu import qemuimg
from hvctl.errors import HvctlError, RefusedError
from hvctl.model.archive import Placement
from hvctl.model.host import HostFacts
from hvctl.model.vm import Disk, DiskSpec, Space, VmSpec
from hvctl.settings import Settings

PULSE = "pulse"


class FolderStorage:
    """`vms_dir/UUID` holds a VM's overlays, `pulse.in` and `pulse.out`, the FIFOs behind its sign-of-life port, and
    `qmp/`, the folder where QEMU makes its second monitor's socket.

    Folders are the owner's to write and everybody's to pass through, never to list: QEMU runs as another user. The
    FIFOs do not lie in `qmp/`, where a QEMU that its guest took over could put something else in their place.
    """

    def __init__(self, settings: Settings, facts: HostFacts) -> None:
        self._vms = settings.vms_dir
        self._images = settings.images_dir
        self._owner = (facts.qemu_uid, facts.qemu_gid)

    def make_disks(self, spec: VmSpec) -> None:
        folder = self._folder(spec.uuid)
        paths = [Path(spec.folder), *(Path(d.path).parent for d in spec.disks)]
        if spec.pulse is not None:
            paths.append(Path(spec.pulse).parent)
        if any(path != folder for path in paths) or Path(spec.monitor).parent != folder / "qmp":
            raise RefusedError(f"the files of VM {spec.name} would lie outside {folder}.")
        new = not folder.exists()
        try:
            self._make(spec, folder)
        except BaseException as e:
            if new:
                # Nobody undoes a step that failed, and nothing of a VM that never was may stay.
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(e, OSError):
                raise HvctlError(f"the files of VM {spec.name} cannot be made in {folder}: {e.strerror}.") from e
            raise

    def make_monitor_folder(self, uuid: str) -> None:
        folder = self._folder(uuid)
        try:
            self._make_folders(folder)
            self._make_pulse(folder / PULSE)
        except OSError as e:
            raise HvctlError(f"the folder {folder} cannot be made: {e.strerror}.", "hvctl host prepare") from e

    def _make(self, spec: VmSpec, folder: Path) -> None:
        self._make_folders(folder)
        self._link_image(folder / IMAGE_LINK, Path(spec.kernel).parent)
        for disk in spec.disks:
            self._make_disk(disk)
        if spec.pulse is not None:
            self._make_pulse(Path(spec.pulse))
        # A VM that is acknowledged has its files after a power failure, too: the names are written, not only the bytes.
        sync(folder)
        sync(self._vms)

    def _make_folders(self, folder: Path) -> None:
        for path in (self._vms.parent, self._vms, folder):
            path.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._vms.parent.chmod(self._vms.parent.stat().st_mode | 0o011)
        for path in (self._vms, folder):
            path.chmod(0o711)
        monitor = folder / "qmp"
        monitor.mkdir(mode=0o700, exist_ok=True)
        os.chown(monitor, *self._owner)
        monitor.chmod(0o700)

    def _make_pulse(self, path: Path) -> None:
        for end in pulse.ends(str(path)):
            if not (os.path.lexists(end) and stat.S_ISFIFO(os.lstat(end).st_mode)):
                os.mkfifo(end, 0o600)
            os.chown(end, *self._owner, follow_symlinks=False)
            Path(end).chmod(0o600)

    def remove(self, uuid: str) -> None:
        folder = self._folder(uuid)
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            return
        except OSError as e:
            raise HvctlError(f"the folder {folder} cannot be removed: {e.strerror}.") from e

    def place_disks(self, uuid: str, load: str, disks: Sequence[Placement]) -> None:
        diskplace.place(self._note(uuid), load, disks)

    def return_disks(self, uuid: str, load: str, overlays: Sequence[str]) -> None:
        diskplace.take_back(self._note(uuid), load, overlays)

    def release_disks(self, uuid: str, load: str, overlays: Sequence[str]) -> None:
        diskplace.release(self._note(uuid), load, overlays)

    def kept_disks(self, uuid: str) -> str | None:
        return diskplace.kept(self._note(uuid))

    def space(self, disk: Disk, tag: str | None = None) -> Space:
        return diskspace.space(disk, tag)

    def _note(self, uuid: str) -> Path:
        return self._folder(uuid) / "load.json"

    def folders(self) -> tuple[str, ...]:
        try:
            names = sorted(entry.name for entry in self._vms.iterdir() if entry.is_dir() and not entry.is_symlink())
        except FileNotFoundError:
            return ()
        return tuple(name for name in names if _is_uuid(name))

    def _folder(self, vm: str) -> Path:
        if not _is_uuid(vm):
            raise RefusedError(f"{vm!r} is not the UUID of a VM.")
        return self._vms / vm

    def _link_image(self, link: Path, image: Path) -> None:
        """So that the image cannot be deleted while the VM is there. A kernel from elsewhere is not ours to keep."""
        if not image.is_relative_to(self._images) or (link.is_symlink() and link.readlink() == image):
            return
        link.unlink(missing_ok=True)
        link.symlink_to(image)

    def _make_disk(self, disk: DiskSpec) -> None:
        """Made beside its place and moved there when complete, so what is there already is never half of a disk."""
        path = Path(disk.path)
        backing = None if disk.backing is None else Path(disk.backing)
        if path.exists():
            self._check_same(disk, path, backing)
            return
        partial = path.with_name(f".{path.name}.partial")
        partial.unlink(missing_ok=True)
        if backing is None:
            qemuimg.create_empty(partial, disk.size)
        else:
            backing_format = disk.backing_format or ""
            qemuimg.check_chain(backing, backing_format, [self._images])
            qemuimg.create_overlay(partial, backing, backing_format, disk.size)
        os.chown(partial, *self._owner)
        partial.rename(path)

    def _check_same(self, disk: DiskSpec, path: Path, backing: Path | None) -> None:
        answer = qemuimg.info(path, "qcow2")
        name = answer.get("backing-filename")
        if (None if name is None else Path(name)) != backing or answer["virtual-size"] != disk.size:
            raise RefusedError(
                f"there is another disk already at {path}.", "look at it, and remove it if it is not needed"
            )


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False
