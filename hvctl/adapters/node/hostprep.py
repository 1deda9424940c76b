"""What a host needs before hvctl works on it, as changes computed from what is there now. Nothing is printed and
nothing is done until a change is applied; once all are applied, none is left."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import assert_never

from hvctl.adapters.atomicfile import replace_file
from hvctl.adapters.node import daemons, kvmdevice
from hvctl.adapters.node.hostpaths import HOST, HostPaths
from hvctl.adapters.node.qemuconf import BACKUP, change_setting, setting
from hvctl.adapters.tools import run_tool
from hvctl.errors import HvctlError, RefusedError, UnreachableError
from hvctl.settings import Settings

BACKING = "memory_backing_dir"
_BEGIN, _END = "# hvctl host prepare: begin", "# hvctl host prepare: end"
_GLOB, _ESCAPED = re.compile(r'([\\*?\[\]{}^"])'), r"\\\1"
Run = Callable[[Sequence[str]], "CompletedProcess[str]"]


@dataclass(frozen=True, slots=True)
class MakeFolder:
    path: Path
    mode: int


@dataclass(frozen=True, slots=True)
class WriteFile:
    path: Path
    text: str


@dataclass(frozen=True, slots=True)
class SetBackingDir:
    conf: Path
    value: str


@dataclass(frozen=True, slots=True)
class RunTool:
    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OpenKvm:
    device: Path


@dataclass(frozen=True, slots=True)
class RestartLibvirt:
    uri: str
    paths: HostPaths


@dataclass(frozen=True, slots=True)
class MigrateDatabase:
    url: str


Action = MakeFolder | WriteFile | SetBackingDir | RunTool | OpenKvm | RestartLibvirt | MigrateDatabase


@dataclass(frozen=True, slots=True)
class HostChange:
    """One difference: what is now, what will be, and how, in words; `action` is for apply()."""

    name: str
    now: str
    wanted: str
    how: str
    action: Action


def folders(settings: Settings) -> tuple[tuple[Path, int], ...]:
    """Every folder of hvctl with its mode, parents first. 0711: QEMU's own user has to pass through, not to look;
    0755: base images are no secret."""
    state, run, ram = Path(settings.state_dir), Path(settings.run_dir), Path(settings.ram_dir)
    return (
        (state, 0o711),
        (settings.images_dir, 0o755),
        (settings.vms_dir, 0o711),
        (run, 0o711),
        (settings.locks_dir, 0o700),
        (ram, 0o711),
        (settings.guests_ram_dir, 0o711),
        (settings.snapshots_dir, 0o711),
    )


def changes(settings: Settings, paths: HostPaths = HOST, run: Run = run_tool) -> tuple[HostChange, ...]:
    """What has to change on this host, in the order to apply; empty when it is prepared. Reads only."""
    found = [c for path, mode in folders(settings) for c in _folder(path, mode)]
    if daemons.systemd(paths):
        found += _volatile_folders(settings, paths)
    if not paths.tun.exists():
        found.append(_tool("tun device", f"{paths.tun} does not exist", f"{paths.tun}", ("modprobe", "tun")))
    if (now := kvmdevice.closed(paths.kvm)) is not None:
        wanted = f"mode {kvmdevice.MODE:04o}, group {kvmdevice.GROUP}"
        found.append(HostChange(f"device {paths.kvm}", now, wanted, "chgrp, chmod", OpenKvm(paths.kvm)))
    conf = _backing_dir(settings, paths)
    found += conf
    stale = daemons.libvirtd_runs(paths) and (bool(conf) or daemons.older_than_its_configuration(paths))
    found += [_tool(name, now, "runs, and does after a boot", argv) for name, now, argv in daemons.idle(paths, run)]
    if stale:
        found.append(
            HostChange(
                "libvirtd",
                "runs with the qemu.conf from before",
                "runs with the one there is",
                "restart libvirtd; the guests keep running",
                RestartLibvirt(settings.uri, paths),
            )
        )
    found += _apparmor(settings, paths)
    found += _database(settings)
    return tuple(found)


def apply(change: HostChange, run: Run = run_tool) -> None:
    """Make one change; HvctlError if it cannot be made, and then nothing of it was."""
    match change.action:
        case MakeFolder(path, mode):
            _make_folder(path, mode)
        case WriteFile(path, text):
            try:
                replace_file(path, text, mode=0o644)
            except OSError as e:
                raise UnreachableError(f"{path} cannot be written: {e.strerror}.", "run hvctl as root") from e
        case SetBackingDir(conf, value):
            change_setting(conf, BACKING, value)
        case RunTool(argv):
            run(argv)
        case OpenKvm(device):
            kvmdevice.open_to_group(device)
        case RestartLibvirt(uri, paths):
            daemons.restart_libvirtd(uri, paths, run)
        case MigrateDatabase(url):
            from hvctl.adapters.store.store import Store

            with Store(url) as store:
                store.migrate()
        case _ as never:
            assert_never(never)


def _tool(name: str, now: str, wanted: str, argv: tuple[str, ...]) -> HostChange:
    return HostChange(name, now, wanted, " ".join(argv), RunTool(argv))


def _folder(path: Path, mode: int) -> Iterator[HostChange]:
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        now = "missing"
    except OSError as e:
        raise UnreachableError(f"{path} cannot be seen: {e.strerror}.", "run hvctl as root") from e
    else:
        if not path.is_dir() or path.is_symlink():
            now = "not a folder"
        elif (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (mode, os.geteuid(), os.getegid()):
            return
        else:
            now = f"mode {status.st_mode & 0o7777:04o}, owner {status.st_uid}:{status.st_gid}"
    wanted = f"mode {mode:04o}, owner {os.geteuid()}:{os.getegid()}"
    yield HostChange(f"folder {path}", now, wanted, "mkdir, chown, chmod", MakeFolder(path, mode))


def _make_folder(path: Path, mode: int) -> None:
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.mkdir(mode=mode, exist_ok=True)
        # Through a descriptor of the folder itself: the name cannot be turned into a link in between.
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchown(fd, os.geteuid(), os.getegid())
            os.fchmod(fd, mode)
        finally:
            os.close(fd)
    except (FileExistsError, NotADirectoryError) as e:
        raise RefusedError(f"{path} is not a folder.", f"look at it and move it away: ls -ld {path}") from e
    except OSError as e:
        raise UnreachableError(f"{path} cannot be made: {e.strerror}.", "run hvctl as root") from e


def _volatile_folders(settings: Settings, paths: HostPaths) -> Iterator[HostChange]:
    """systemd makes them at boot, before anybody else can take their names in the shared folder of tmpfs."""
    volatile = (Path(settings.run_dir), Path(settings.ram_dir))
    lines = [
        f"d {path} {mode:04o} root root -\n"
        for path, mode in folders(settings)
        if any(path.is_relative_to(v) for v in volatile)
    ]
    text = "# Written by hvctl host prepare.\n" + "".join(lines)
    now = paths.tmpfiles.read_text() if paths.tmpfiles.exists() else None
    if now != text:
        yield HostChange(
            f"file {paths.tmpfiles}",
            "missing" if now is None else "different",
            "makes the volatile folders at boot",
            "write it",
            WriteFile(paths.tmpfiles, text),
        )


def _backing_dir(settings: Settings, paths: HostPaths) -> list[HostChange]:
    if not paths.qemu_conf.exists():
        raise UnreachableError(f"{paths.qemu_conf} does not exist.", "apt install libvirt-daemon-system")
    now = setting(paths.qemu_conf, BACKING)
    wanted = settings.guests_ram_dir
    if now is not None and Path(now) == wanted:
        return []
    return [
        HostChange(
            f"{BACKING} in {paths.qemu_conf}",
            now or "libvirt's default",
            str(wanted),
            f"edit the line; the file as it was stays as {paths.qemu_conf.name}{BACKUP}",
            SetBackingDir(paths.qemu_conf, str(wanted)),
        )
    ]


def _apparmor(settings: Settings, paths: HostPaths) -> Iterator[HostChange]:
    """libvirt confines each QEMU to the files in its domain's definition: what only hvctl gives it is denied. A profile
    is read when a VM starts, so there is nothing to reload, and VMs that run keep the one they have."""
    try:
        if paths.apparmor.read_text().strip() != "Y" or not paths.apparmor_local.parent.is_dir():
            return
        now = paths.apparmor_local.read_text() if paths.apparmor_local.exists() else ""
    except FileNotFoundError:
        return
    except OSError as e:
        raise UnreachableError(f"{e.filename} cannot be read: {e.strerror}.", "run hvctl as root") from e
    rules = (
        (settings.vms_dir, "*/qmp/monitor.sock", "rw"),
        (settings.vms_dir, "*/pulse.{in,out}", "rw"),
        (settings.images_dir, "*/{kernel,initrd}", "r"),
        (settings.snapshots_dir, "*/*/vmstate.qcow2", "rwk"),
        # Beside the disk that goes back: that of a VM that was adopted may lie anywhere.
        (Path("/"), "**.hvctl-standin", "rwk"),
        (Path("/"), "**.hvctl-backing", "rk"),
    )
    lines = [f'"{_GLOB.sub(_ESCAPED, str(root)).rstrip("/")}/{rest}" {rights},' for root, rest, rights in rules]
    block = "\n".join([_BEGIN, *lines, _END]) + "\n"
    others = re.sub(rf"{_BEGIN}\n.*?{_END}\n", "", now, flags=re.DOTALL)
    wanted = (others if not others or others.endswith("\n") else f"{others}\n") + block
    if now != wanted:
        yield HostChange(
            f"AppArmor rules in {paths.apparmor_local}",
            "different" if _BEGIN in now else "missing",
            "QEMU may make hvctl's monitor, and open the sign-of-life port, kernels, the device state of snapshots "
            "and stand-ins of disks",
            "add the lines; what else is in the file stays",
            WriteFile(paths.apparmor_local, wanted),
        )


def _database(settings: Settings) -> Iterator[HostChange]:
    from hvctl.adapters.store.store import Store

    try:
        with Store(settings.database) as store:
            store.check_schema()
    except HvctlError as e:
        yield HostChange(
            "database",
            e.message.removesuffix("."),
            "has this hvctl's tables",
            "migrate",
            MigrateDatabase(settings.database),
        )
