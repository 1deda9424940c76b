"""A command as process 1 of namespaces of its own, with Debian 13 as its root: what it starts, mounts, plugs into a
bridge or writes beside the cache ends with it, however it ends.

Called as a program it is the part that runs in the namespaces and on the host's files, until there is another root.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWCGROUP = 0x02000000
# What hvctl and libvirt set for a VM; the others stay the caller's.
CONTROLLERS = {"cpu", "cpuacct", "cpuset"}
GROUP = "hvctl-debian13-"
DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "kvm", "net/tun", "userfaultfd", "vhost-net")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Place:
    """root: Debian's folder. scratch: an empty folder to mount on. kept: what is written into the root stays, and the
    network is the host's; otherwise it is in RAM, and there is no network. binds: of the host, read-only."""

    root: str
    scratch: str
    kept: bool
    binds: Mapping[str, str]
    group: str = ""


def run(place: Place, argv: Sequence[str], env: Mapping[str, str], leash: Sequence[str]) -> int:
    """The command's status; when it returns, no process is left. `leash` ties the first process to this one."""
    # What loses its parent becomes this process's own, to be waited for.
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    group = f"{GROUP}{os.getpid()}"
    document = json.dumps({"place": asdict(place) | {"group": group}, "argv": list(argv), "env": dict(env)})
    own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc"]
    own += [] if place.kept else ["--net"]
    _remove_groups()
    process = subprocess.Popen([*leash, *own, sys.executable, __file__, document])
    # The terminal tells pytest as well, which ends in order.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
        process.kill()
        with suppress(ChildProcessError):
            while True:
                os.wait()
        _remove_groups()


# --- control groups


def _hierarchies() -> Iterator[tuple[Path, str, str]]:
    """Where each is mounted, its type, and its options."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        named = CONTROLLERS & set(options.split(","))
        if kind == "cgroup2" or (kind == "cgroup" and named):
            yield Path(where), kind, ",".join(sorted(named))


def _own_group(where: Path, options: str) -> Path:
    """The group that this process is in."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if set(filter(None, names.split(","))) >= set(filter(None, options.split(","))) and bool(names) == bool(
            options
        ):
            return where / path.lstrip("/")
    raise FileNotFoundError(f"no group of {where}")


def _enter_groups(name: str) -> None:
    for where, _, options in _hierarchies():
        group = _own_group(where, options) / name
        group.mkdir()
        for setting in ("cpuset.cpus", "cpuset.mems"):
            if (group / setting).exists() and options:
                (group / setting).write_text((group.parent / setting).read_text())
        (group / "cgroup.procs").write_text("0")
    if _libc.unshare(CLONE_NEWCGROUP):
        raise OSError(ctypes.get_errno(), "unshare")


def _remove_groups() -> None:
    """This process's, and those of one that was killed."""
    for where, _, options in _hierarchies():
        for group in _own_group(where, options).glob(f"{GROUP}*"):
            pid = group.name.removeprefix(GROUP)
            if pid != str(os.getpid()) and Path("/proc", pid).exists():
                continue
            for folder, _, _ in os.walk(group, topdown=False):
                with suppress(OSError):
                    Path(folder).rmdir()


# --- within the namespaces


def _mount(kind: str, target: Path, options: str = "") -> None:
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", kind, *(["-o", options] if options else []), "debian13", target], check=True)


def _bind(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink():
            target.unlink()
        target.touch()
    subprocess.run(["mount", "--bind", source, target], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)


@contextmanager
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def _root(place: Place) -> Path:
    if place.kept:
        subprocess.run(["mount", "--bind", place.root, place.root], check=True)
        return Path(place.root)
    scratch = Path(place.scratch)
    _mount("tmpfs", scratch, "mode=0755")
    upper, work, root = (scratch / name for name in ("upper", "work", "root"))
    upper.mkdir()
    work.mkdir()
    _mount("overlay", root, f"lowerdir={place.root},upperdir={upper},workdir={work}")
    return root


def _devices(dev: Path) -> None:
    """Nodes of its own: hvctl sets the owner of some, and libvirt copies what it finds."""
    _mount("tmpfs", dev, "mode=0755")
    with _no_umask():
        for name in DEVICES:
            source = Path("/dev", name)
            if source.exists():
                (dev / name).parent.mkdir(exist_ok=True)
                mode = stat.S_IFMT(source.stat().st_mode) | (0o660 if name in ("kvm", "vhost-net") else 0o666)
                os.mknod(dev / name, mode, source.stat().st_rdev)
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        (dev / name).symlink_to(f"/proc/self/{target}")
    (dev / "ptmx").symlink_to("pts/ptmx")
    _mount("devpts", dev / "pts", "newinstance,ptmxmode=0666,mode=0620,gid=5")
    _mount("tmpfs", dev / "shm", "mode=1777")


def _groups(sys_fs_cgroup: Path, hierarchies: Sequence[tuple[Path, str, str]]) -> None:
    """The same ones at the same places, seen from this process's own group down."""
    if [kind for _, kind, _ in hierarchies] == ["cgroup2"]:
        _mount("cgroup2", sys_fs_cgroup)
        # Where controllers are handed down no process may be.
        (sys_fs_cgroup / "init").mkdir()
        (sys_fs_cgroup / "init/cgroup.procs").write_text("0")
        given = (sys_fs_cgroup / "cgroup.controllers").read_text().split()
        (sys_fs_cgroup / "cgroup.subtree_control").write_text(" ".join(f"+{c}" for c in given))
        return
    _mount("tmpfs", sys_fs_cgroup, "mode=0755")
    for where, kind, options in hierarchies:
        _mount(kind, sys_fs_cgroup / where.name, options)


def main() -> None:
    document = json.loads(sys.argv[1])
    place = Place(**document["place"])
    hierarchies = list(_hierarchies())
    _enter_groups(place.group)
    root = _root(place)
    _mount("proc", root / "proc")
    _mount("sysfs", root / "sys")
    _groups(root / "sys/fs/cgroup", hierarchies)
    _devices(root / "dev")
    _mount("tmpfs", root / "run", "mode=0755")
    _mount("tmpfs", root / "tmp", "mode=1777")
    for source, target in place.binds.items():
        _bind(Path(source), root / target.lstrip("/"))
    subprocess.run(["hostname", "debian13"], check=True)
    os.chdir(root)
    subprocess.run(["pivot_root", ".", "mnt"], check=True)
    os.chdir("/")
    env = document["env"]
    subprocess.run(["umount", "--lazy", "/mnt"], env=env, check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], env=env, check=True)
    os.execvpe(document["argv"][0], document["argv"], env)


if __name__ == "__main__":
    main()
