"""libvirt's daemons: whether they run, how to start them with systemd or without it, and a restart of libvirtd that
proves that every guest is still there."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess

from hvctl.adapters.node.hostpaths import HostPaths
from hvctl.errors import DeadlineError, HvctlError, NotUndoneError, RefusedError

Run = Callable[[Sequence[str]], "CompletedProcess[str]"]

STOP_SECONDS = 20.0
# libvirtd.service enables its sockets with it; virtlogd is started by its socket alone.
UNITS = {"virtlogd": "virtlogd.socket", "libvirtd": "libvirtd.service"}


def systemd(paths: HostPaths) -> bool:
    """Whether PID 1 is systemd."""
    return _name(paths, 1) == "systemd"


def libvirtd_runs(paths: HostPaths) -> bool:
    return _pid(paths, "libvirtd", paths.libvirtd_pid) is not None


def idle(paths: HostPaths, run: Run) -> list[tuple[str, str, tuple[str, ...]]]:
    """The daemons to start or to enable, in order: name, what is now, and the command."""
    files = {"virtlogd": paths.virtlogd_pid, "libvirtd": paths.libvirtd_pid}
    running = {name for name, file in files.items() if _pid(paths, name, file) is not None}
    if not systemd(paths):
        return [(name, "does not run", (name, "-d")) for name in files if name not in running]
    found: list[tuple[str, str, tuple[str, ...]]] = []
    for name, unit in UNITS.items():
        # libvirtd ends when nobody uses it; its socket starts it again.
        units = (f"{name}.socket", f"{name}.service")
        active = name in running or any(_answers(run, "is-active", u, "active") for u in units)
        enabled = _answers(run, "is-enabled", unit, "enabled")
        if not active or not enabled:
            now = f"{'active' if active else 'inactive'}, {'enabled' if enabled else 'not enabled'}"
            found.append((name, now, ("systemctl", "enable", *(() if active else ("--now",)), unit)))
    return found


def older_than_its_configuration(paths: HostPaths) -> bool:
    """Whether qemu.conf was written after libvirtd, which runs, was started: it is read only then."""
    return paths.qemu_conf.stat().st_mtime_ns > paths.libvirtd_pid.stat().st_mtime_ns


def restart_libvirtd(uri: str, paths: HostPaths, run: Run) -> None:
    """Restart libvirtd and see that the same guests are active. RefusedError: it was not started as a daemon, so
    whoever started it has to do it. NotUndoneError: it does not answer, or guests are missing."""
    pid = _pid(paths, "libvirtd", paths.libvirtd_pid)
    if pid is None:
        return
    before = _active(uri, run)
    if systemd(paths) and _answers(run, "is-active", "libvirtd.service", "active"):
        run(["systemctl", "restart", "libvirtd.service"])
    else:
        command = _command(paths, pid)
        if not {"-d", "--daemon"} & set(command):
            raise RefusedError(
                f"libvirtd ({pid}) runs in the foreground of something else.", "restart it the way it was started"
            )
        _stop(pid)
        try:
            run(command)
        except HvctlError as e:
            raise NotUndoneError(f"libvirtd was stopped and does not start: {e.message}", "run: libvirtd -v") from e
    try:
        after = {uuid for uuid in _active(uri, run) if _has_again(uri, run, uuid)}
    except HvctlError as e:
        raise NotUndoneError(f"libvirtd does not answer after its restart: {e.message}", "run: libvirtd -v") from e
    if lost := before - after:
        raise NotUndoneError(
            f"guests are no longer active after libvirtd's restart: {', '.join(sorted(lost))}.", "virsh list --all"
        )


def _active(uri: str, run: Run) -> set[str]:
    return set(run(["virsh", "-c", uri, "list", "--uuid"]).stdout.split())


def _has_again(uri: str, run: Run, uuid: str) -> bool:
    """libvirtd lists a guest as active before it has its monitor again, and ends one whose monitor it does not get.
    What asks QEMU waits for that."""
    try:
        run(["virsh", "-c", uri, "dommemstat", uuid])
    except HvctlError:
        return False
    return True


def _answers(run: Run, verb: str, unit: str, wanted: str) -> bool:
    try:
        return run(["systemctl", verb, unit]).stdout.strip() == wanted
    except HvctlError:
        return False


def _pid(paths: HostPaths, name: str, file: Path) -> int | None:
    """The pid in a pid file, if a live process of that name has it."""
    try:
        pid = int(file.read_text())
    except (OSError, ValueError):
        return None
    return pid if _name(paths, pid) == name else None


def _name(paths: HostPaths, pid: int) -> str | None:
    try:
        return (paths.proc / str(pid) / "comm").read_text().strip()
    except OSError:
        return None


def _command(paths: HostPaths, pid: int) -> list[str]:
    raw = (paths.proc / str(pid) / "cmdline").read_bytes()
    return [part.decode() for part in raw.rstrip(b"\0").split(b"\0")]


def _stop(pid: int) -> None:
    fd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(fd, signal.SIGTERM)
        if not select.select([fd], [], [], STOP_SECONDS)[0]:
            raise DeadlineError(f"libvirtd ({pid}) did not end within {STOP_SECONDS:g} s.", "virsh list")
    finally:
        os.close(fd)
