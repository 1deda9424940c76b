"""A VM's lock is the kernel's: it ends with its holder, whatever is written in the file and whatever the clock says."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from hvctl.engine import lock as module
from hvctl.engine.lock import free, vm_lock
from hvctl.errors import BusyError
from hvctl.model.operation import Phase

HOLDER = """
import sys
from pathlib import Path
from hvctl.engine.lock import vm_lock
from hvctl.model.operation import Phase
with vm_lock(Path(sys.argv[1]), "a", 0) as lock:
    lock.mark(7, Phase.TOUCHING)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_it_is_held_from_its_first_moment(tmp_path: Path) -> None:
    """Before anything is written into the file: two that come at once are not both let in."""
    with vm_lock(tmp_path, "a", 0):
        assert not free(tmp_path, "a")
        assert free(tmp_path, "b")
        with pytest.raises(BusyError, match="another operation"):
            vm_lock(tmp_path, "a", 0).__enter__()
    assert free(tmp_path, "a")


def test_what_a_dead_holder_wrote_keeps_nobody_out(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=rf"operation 7 \(pid {holder.pid}\)"):
            vm_lock(tmp_path, "a", 0).__enter__()
        holder.kill()
    with vm_lock(tmp_path, "a", 0) as lock:
        mark = lock.read()
        assert mark is not None
        assert (mark.operation, mark.phase, mark.pid) == (7, Phase.TOUCHING, holder.pid)


def test_a_mark_with_the_pid_of_somebody_who_lives_keeps_nobody_out(tmp_path: Path) -> None:
    """As after that pid was given to another process."""
    with vm_lock(tmp_path, "a", 0) as lock:
        lock.mark(7, Phase.BEGUN)
    assert free(tmp_path, "a")


def test_the_file_stays_the_same_one(tmp_path: Path) -> None:
    """Who opened it while it was held, and who opens it anew after that, must find one lock and not two."""
    with vm_lock(tmp_path, "a", 0):
        waits = os.open(tmp_path / "a.lock", os.O_RDWR)
    with ExitStack() as stack:
        stack.callback(os.close, waits)
        stack.enter_context(vm_lock(tmp_path, "a", 0))
        assert os.fstat(waits).st_ino == (tmp_path / "a.lock").stat().st_ino


def test_no_child_inherits_it(tmp_path: Path) -> None:
    with vm_lock(tmp_path, "a", 0) as lock:
        assert not os.get_inheritable(lock._fd)


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_clock_that_is_set_neither_ends_a_wait_nor_prolongs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """Of five seconds that are to be waited one is over, by the steady clock, at each look."""
    holder = ExitStack()
    holder.enter_context(vm_lock(tmp_path, "a", 0))
    looks: list[float] = []
    clock = SimpleNamespace(
        monotonic=lambda: float(len(looks)),
        time=lambda: 1e9 + len(looks) + (jump if looks else 0.0),
        sleep=looks.append,
    )
    monkeypatch.setattr(module, "time", clock)
    with holder, pytest.raises(BusyError):
        vm_lock(tmp_path, "a", 5.0).__enter__()
    assert len(looks) == 5
