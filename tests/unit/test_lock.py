"""A VM's lock is the kernel's: it ends with its holder, whatever is written in the file and whatever the clock says."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from hvctl.engine import lock as module
from hvctl.engine.lock import free, tidy, vm_lock
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


def test_a_file_that_says_nothing_goes_with_its_lock(tmp_path: Path) -> None:
    """Also where what was done under it failed; one with a mark stays, since recovery reads it."""
    with suppress(ZeroDivisionError), vm_lock(tmp_path, "a", 0):
        raise ZeroDivisionError
    assert free(tmp_path, "a")
    assert list(tmp_path.iterdir()) == []
    with vm_lock(tmp_path, "a", 0) as lock:
        lock.mark(7, Phase.BEGUN)
    assert [p.name for p in tmp_path.iterdir()] == ["a.lock"]
    with vm_lock(tmp_path, "a", 0) as lock:
        lock.clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("anew", [False, True])
def test_who_opened_a_file_that_went_has_no_lock_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    """Between its open and its flock another holder ends, and with anew a third one begins: nobody would look for the
    lock of a file without a name, so two would be let in."""
    opened, third = os.open, ExitStack()

    def interrupted(path: Path, *arguments: int) -> int:
        fd = opened(path, *arguments)
        monkeypatch.setattr("os.open", opened)
        with vm_lock(tmp_path, "a", 0):
            pass
        if anew:
            third.enter_context(vm_lock(tmp_path, "a", 0))
        return fd

    monkeypatch.setattr("os.open", interrupted)
    with third:
        if anew:
            with pytest.raises(BusyError):
                vm_lock(tmp_path, "a", 0).__enter__()
            return
        with vm_lock(tmp_path, "a", 0):
            assert not free(tmp_path, "a")


RACER = """
import sys
from pathlib import Path
from hvctl.engine import lock
lock.POLL_SECONDS = 0
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[2])):
    with lock.vm_lock(folder / "locks", "a", 60):
        count = int((folder / "count").read_text())
        (folder / "count").write_text(str(count + 1))
"""


def test_processes_that_race_for_a_file_that_comes_and_goes(tmp_path: Path) -> None:
    """Each counts one on, under the lock: as many as came."""
    rounds = 400
    (tmp_path / "count").write_text("0")
    argv = [sys.executable, "-c", RACER, str(tmp_path), str(rounds)]
    racers = [subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    for racer in racers:
        racer.communicate()
    assert [r.returncode for r in racers] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == str(3 * rounds)
    assert list((tmp_path / "locks").iterdir()) == []


def test_what_is_left_of_the_dead_goes(tmp_path: Path) -> None:
    """Empty files, and those of operations that have ended; neither what recovery reads nor what somebody holds."""
    for name, number in (("ended", 1), ("open", 2), ("held", 1)):
        with vm_lock(tmp_path, name, 0) as lock:
            lock.mark(number, Phase.COMMITTED)
    (tmp_path / "empty.lock").touch()
    with vm_lock(tmp_path, "held", 0):
        tidy(tmp_path, lambda _, number: number == 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["held.lock", "open.lock"]


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
