"""Puts the QEMU of a paused guest before all others of the host, as `urgency` does with the thread that holds it:
most of a pause is work of QEMU itself, and on a busy host that would mostly wait for a processor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

# The flag tells ours from what an operator asks of libvirt (<emulatorsched>), which never sets it.
_OURS: Final = os.SCHED_RR | os.SCHED_RESET_ON_FORK
_LOWEST: Final = os.sched_param(1)
_VCPU: Final = "CPU "  # how QEMU names the threads of vCPUs: these stand still
# A cgroup v1 of a kernel with RT_GROUP_SCHED must be given a share of real time, or none of its threads may have any.
_SHARE: Final = "cpu.rt_runtime_us"
_SHARES: Final = ("400000", "200000")  # microseconds of each second: of libvirt's group, and of a VM and what is below


@contextmanager
def urgent_process(pid: int, cgroups: Path = Path("/sys/fs/cgroup")) -> Iterator[None]:
    """All threads of a QEMU process but those of vCPUs and those that an operator gave a policy; where that is not
    allowed they wait for their turn as before."""
    given: list[Path] = []
    first: list[int] = []  # by this call: one around it has others
    try:
        with suppress(OSError):
            try:
                _put_first(pid, first)
            except PermissionError:
                given = _give(_groups(pid, cgroups))
                _put_first(pid, first)
        yield
    finally:
        _calm(first)
        for group in reversed(given):
            with suppress(OSError):  # Somebody below it has a share now: it stays.
                (group / _SHARE).write_text("0")


def calm(pid: int) -> None:
    """What a killed hvctl may have left urgent waits for its turn again."""
    _calm(_threads(pid))


def _calm(threads: list[int]) -> None:
    for thread in threads:
        with suppress(OSError):
            if os.sched_getscheduler(thread) == _OURS:
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def _put_first(pid: int, first: list[int]) -> None:
    for thread in _threads(pid):
        with suppress(FileNotFoundError, ProcessLookupError):  # It ended just now.
            name = Path(f"/proc/{pid}/task/{thread}/comm").read_text()
            if not name.startswith(_VCPU) and os.sched_getscheduler(thread) == os.SCHED_OTHER:
                os.sched_setscheduler(thread, _OURS, _LOWEST)
                first.append(thread)


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]  # noqa: PTH208 - the names are all that is needed
    except OSError:
        return []


def _groups(pid: int, cgroups: Path) -> list[Path]:
    """The groups that a process is in, outermost first, without the root; none where cgroup v1 has no such shares."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            parts = Path(path).parts[1:]
            groups = [(cgroups / "cpu").joinpath(*parts[: n + 1]) for n in range(len(parts))]
            return groups if all((g / _SHARE).exists() for g in groups) else []
    return []


def _give(groups: list[Path]) -> list[Path]:
    """Those that have a share for now. OSError: the host has none left."""
    given: list[Path] = []
    try:
        for group, share in zip(groups, (_SHARES[0], *[_SHARES[1]] * len(groups)), strict=False):
            now = (group / _SHARE).read_text().strip()
            if now in ("0", share):  # The latter is another hvctl's, or a killed one's: the last one takes it away.
                (group / _SHARE).write_text(share)
                given.append(group)
    except OSError:
        for group in reversed(given):
            with suppress(OSError):
                (group / _SHARE).write_text("0")
        raise
    return given
