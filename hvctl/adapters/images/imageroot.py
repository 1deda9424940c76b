"""Builds the root disk of the debian image: mmdebstrap into a folder, ext4 made of it without mounting, then qcow2."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from hvctl.adapters.images.imageinitramfs import Entry
from hvctl.adapters.images.imagepackages import Archive, Package, acquire_options
from hvctl.adapters.qemu import qemuimg
from hvctl.adapters.tools import run_tool
from hvctl.errors import RefusedError, UnreachableError

# What a guest never reads, and what differs from one build to the next.
_EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/lintian/*")
_VARIABLE = (
    "etc/apt/apt.conf.d/99mmdebstrap",
    "etc/hostname",
    "etc/machine-id",
    "etc/resolv.conf",
    "run",
    "tmp",
    "var/cache/apt",
    "var/cache/ldconfig",
    "var/lib/apt/lists",
    "var/lib/dpkg/available",
    "var/log",
)
_EMPTY_FOLDERS = (
    "data",
    "dev",
    "proc",
    "run",
    "sys",
    "tmp",
    "var/cache/apt/archives/partial",
    "var/lib/apt/lists",
    "var/log",
)
# Fixed, since both are drawn at random otherwise; a guest tells its disks apart by the serial that the host gives them.
_UUID = "9f0c3f5e-6d0a-4c1e-8f57-0d6f3a8b7c21"


def make_root(
    archive: Archive,
    packages: Iterable[str],
    files: Mapping[str, Entry],
    size: int,
    epoch: int,
    work: Path,
    target: Path,
    progress: Callable[[str], None],
) -> tuple[Package, ...]:
    """Write the qcow2 image to `target`; the packages that are in it."""
    if os.geteuid() != 0:
        raise UnreachableError(
            "only root can unpack a root file system.", "run it as root: sudo hvctl image build debian"
        )
    tree = work / "root"
    progress("installing Debian into a folder (mmdebstrap)")
    _bootstrap(archive, packages, epoch, tree)
    installed = _installed(tree)
    progress(f"making the ext4 disk of {len(installed)} packages")
    _clean(tree)
    _add(tree, files)
    _set_times(tree, epoch)
    raw = work / "root.raw"
    _make_ext4(tree, raw, size, epoch)
    shutil.rmtree(tree)
    progress("converting the disk to qcow2")
    qemuimg.convert(raw, "raw", target)
    raw.unlink()
    return installed


def _bootstrap(archive: Archive, packages: Iterable[str], epoch: int, tree: Path) -> None:
    options = [f"--dpkgopt=path-exclude={pattern}" for pattern in _EXCLUDED]
    options += ["--dpkgopt=path-include=/usr/share/doc/*/copyright"]
    options += [f"--aptopt={option}" for option in acquire_options()]
    run_tool(
        ["mmdebstrap", "--quiet", "--mode=root", "--format=directory", "--variant=minbase", *options,
         f"--include={','.join(packages)}", archive.codename, tree, "-"],
        stdin=archive.sources,
        env={"SOURCE_DATE_EPOCH": str(epoch)},
        seconds=1800,
    )  # fmt: skip


def _installed(tree: Path) -> tuple[Package, ...]:
    status = (tree / "var/lib/dpkg/status").read_text()
    pairs = re.findall(r"^Package: (\S+)\n(?:[^\n]+\n)*?Version: (\S+)\n", status, re.MULTILINE)
    return tuple(sorted((Package(name, version) for name, version in pairs), key=lambda p: p.name))


def _clean(tree: Path) -> None:
    for name in _VARIABLE:
        path = tree / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for name in _EMPTY_FOLDERS:
        (tree / name).mkdir(parents=True, exist_ok=True)
    (tree / "tmp").chmod(0o1777)


def _add(tree: Path, files: Mapping[str, Entry]) -> None:
    """The guest's scripts. Debian's own names win where they exist: a merged /usr makes /sbin and /usr/sbin one."""
    for name, entry in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if stat.S_ISLNK(entry.mode):
            path.symlink_to(entry.data.decode())
        else:
            path.write_bytes(entry.data)
            path.chmod(stat.S_IMODE(entry.mode))


def _set_times(tree: Path, epoch: int) -> None:
    """Nothing is younger than the recipe's time; what is older keeps the time of its package."""
    for folder, folders, files in os.walk(tree, topdown=False):
        for path in (*(Path(folder) / name for name in (*folders, *files)), Path(folder)):
            os.utime(path, (epoch, min(epoch, int(path.lstat().st_mtime))), follow_symlinks=False)


def _make_ext4(tree: Path, raw: Path, size: int, epoch: int) -> None:
    found = [p.lstat() for p in tree.rglob("*")]
    needed = sum(s.st_size for s in found)
    if needed > size:
        raise RefusedError(f"the packages need {needed} bytes, more than the root disk of {size} bytes.")
    # mke2fs takes the change time from the folder, where nobody can set it, and reads folders, which sets their
    # access time: both are set afterwards. Inodes are given out in order: 11 is lost+found, then one for each file
    # with all its names.
    inodes = range(11, 12 + len({s.st_ino for s in found}))
    fields = (("ctime", f"@{epoch}"), ("ctime_extra", "0"), ("atime", f"@{epoch}"), ("atime_extra", "0"))
    commands = "".join(f"sif <{i}> {name} {value}\n" for i in inodes for name, value in fields)
    env = {"SOURCE_DATE_EPOCH": str(epoch), "E2FSPROGS_FAKE_TIME": str(epoch)}
    with raw.open("xb") as disk:
        disk.truncate(size)
    # Nothing is left for the guest's kernel to initialise: it would write all of it into every overlay.
    extended = f"hash_seed={_UUID},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0"
    run_tool(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-L", "root", "-U", _UUID, "-E", extended, "-d", tree, raw],
        env=env,
    )
    run_tool(["debugfs", "-w", "-f", "-", raw], stdin=commands, env=env)
