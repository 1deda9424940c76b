"""System calls made inside another process: it goes on as if nothing had happened, whatever it was doing, and whenever
the one that traces it dies."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hvctl.adapters.ram.trackers import ptrace
from hvctl.adapters.ram.trackers.injection import system_call
from hvctl.errors import DeadlineError, RefusedError, UnreachableError

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="only for x86-64"),
]

GETPID, DUP, CLOSE = 39, 32, 3

# What each test runs has these: `say` tells the test, `hear` waits for it.
_PRELUDE = """
import ctypes, errno, json, math, os, signal, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def say(what):
    print(json.dumps(what), flush=True)
def hear():
    return sys.stdin.readline()
def call(name, *arguments):
    result = getattr(libc, name)(*arguments)
    return [result, errno.errorcode.get(ctypes.get_errno(), "") if result < 0 else ""]
def work(n):
    # Registers of all kinds hold something at any moment.
    x = 1.0
    for i in range(1, n):
        x = math.fmod(x * 1.0000001 + math.sqrt(i) / (i + 0.5), 1000.0)
    return x
"""


class Child:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.pid = process, process.pid

    def heard(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def status(self, name: str) -> str:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith(f"{name}:"))

    def await_call(self, *numbers: int) -> None:
        """The first thread is in one of these system calls."""
        place = Path(f"/proc/{self.pid}/syscall")
        while place.read_text().split()[0] not in map(str, numbers):
            assert self.process.poll() is None
            time.sleep(0.001)

    def descriptors(self) -> set[str]:
        return {p.name for p in Path(f"/proc/{self.pid}/fd").iterdir()}


@contextmanager
def running(script: str) -> Iterator[Child]:
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _PRELUDE + script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield Child(process)
    finally:
        process.kill()
        process.send_signal(signal.SIGCONT)
        process.communicate()


# --- what the process was doing


BLOCKED = {
    # name: what it does, the system call, whether the test has to end it, what it returns
    "nanosleep": ("call('syscall', 35, struct.pack('=2q', 0, 300_000_000), None)", (35,), False, [0, ""]),
    "clock_nanosleep": (
        "call('clock_nanosleep', 1, 0, struct.pack('=2q', 0, 300_000_000), None)",
        (230,),
        False,
        [0, ""],
    ),
    "poll with a timeout": ("call('poll', None, 0, 300)", (7,), False, [0, ""]),
    "poll for a descriptor": ("call('poll', struct.pack('=ihh', 0, 1, 0), 1, -1)", (7,), True, [1, ""]),
    "ppoll": ("call('ppoll', struct.pack('=ihh', 0, 1, 0), 1, None, bytes(128))", (271,), True, [1, ""]),
    "select": ("call('select', 1, bytearray(b'\\1' + bytes(127)) and struct.pack('=16q', 1, *[0] * 15), None, None, "
               "struct.pack('=2q', 0, 300_000_000 // 1000))", (23, 270), False, [0, ""]),
    "read": ("call('read', 0, ctypes.create_string_buffer(1), 1)", (0,), True, [1, ""]),
    "futex with a timeout": (
        "call('syscall', 202, ctypes.byref(ctypes.c_int(5)), 0, 5, struct.pack('=2q', 0, 300_000_000))",
        (202,),
        False,
        [-1, "ETIMEDOUT"],
    ),
    "wait for a child": ("os.wait()[1]", (61,), True, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKED)
def test_a_system_call_that_was_broken_off_is_taken_up_again(name: str) -> None:
    """Many times over; those with a timeout with the rest of it."""
    what, numbers, ends, result = BLOCKED[name]
    before = "if os.fork() == 0: os._exit(hear() != chr(10))" if name == "wait for a child" else ""
    with running(f"{before}\nsay('ready'); say({what}); say(hear())") as child:
        assert child.heard() == "ready"
        child.await_call(*numbers)
        for _ in range(30):
            assert system_call(child.pid, GETPID) == child.pid
        if ends:
            child.tell()
        assert child.heard() == result
        if not ends or "poll" not in name:  # Those that polled have not read it yet.
            child.tell()
        assert child.heard() == "\n"


def test_results_and_errors_are_the_calls_own() -> None:
    with running("say(0); hear()") as child:
        child.heard()
        before = child.descriptors()
        made = system_call(child.pid, DUP, 0)
        assert child.descriptors() == before | {str(made)}
        assert system_call(child.pid, CLOSE, made) == 0
        assert child.descriptors() == before
        with pytest.raises(OSError, match="Bad file descriptor"):
            system_call(child.pid, CLOSE, made)


def test_all_arguments_arrive() -> None:
    """mmap has six."""
    with running("say(0); hear()") as child:
        child.heard()
        place = system_call(child.pid, 9, 0x5000_0000, 8192, 3, 0x100022, (1 << 64) - 1, 0)
        assert place == 0x5000_0000
        maps = Path(f"/proc/{child.pid}/maps").read_text()
        assert "50000000-50002000 rw-p" in maps


def test_signals_are_neither_lost_nor_held_up() -> None:
    """A timer fires a thousand times a second; one blocked signal is pending all the time."""
    script = """
count = 0
def count_up(*_):
    global count
    count += 1
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
os.kill(os.getpid(), signal.SIGUSR1)
signal.signal(signal.SIGALRM, count_up)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
say(0)
hear()
signal.setitimer(signal.ITIMER_REAL, 0)
say([count > 0, signal.SIGUSR1 in signal.sigpending()])
signal.signal(signal.SIGUSR1, lambda *_: say("at last"))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
"""
    with running(script) as child:
        child.heard()
        masks = child.status("SigBlk"), child.status("SigCgt"), child.status("SigIgn")
        for _ in range(200):
            assert system_call(child.pid, GETPID) == child.pid
        assert (child.status("SigBlk"), child.status("SigCgt"), child.status("SigIgn")) == masks
        child.tell()
        assert child.heard() == [True, True]
        assert child.heard() == "at last"


WORKERS = """
def share():
    results.append([work(20000) for _ in range(20)])
results = []
expected = work(20000)
threads = [threading.Thread(target=share) for _ in range(6)]
for thread in threads:
    thread.start()
say(0)
for thread in threads:
    thread.join()
say(all(x == expected for result in results for x in result) and len(results))
hear()
"""


def test_a_process_of_many_threads_goes_on() -> None:
    with running(WORKERS) as child:
        child.heard()
        while len(list(Path(f"/proc/{child.pid}/task").iterdir())) > 1:
            assert system_call(child.pid, GETPID) == child.pid
        assert child.heard() == 6


def test_another_thread_does_it_if_the_first_one_computes() -> None:
    script = """
thread = threading.Thread(target=hear)
thread.start()
say(0)
while thread.is_alive():
    work(100000)
say("done")
"""
    with running(script) as child:
        child.heard()
        for _ in range(20):
            assert system_call(child.pid, GETPID) == child.pid
        child.tell()
        assert child.heard() == "done"


def test_a_process_that_only_computes_is_left_alone() -> None:
    with running("say(0)\nsay(work(10**9))") as child:
        child.heard()
        # Seen computing and never in a system call; the interpreter's own are over once it has started.
        with pytest.raises(DeadlineError, match="no thread of process"):
            while True:
                system_call(child.pid, GETPID, seconds=0.1)
        assert child.process.poll() is None
        assert child.status("TracerPid") == "0"


# --- when it cannot be


def test_a_stopped_process_is_a_deadline_and_stays_stopped() -> None:
    with running("say(0); say(hear())") as child:
        child.heard()
        child.await_call(0)
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        for _ in range(3):
            with pytest.raises(DeadlineError, match="is stopped"):
                system_call(child.pid, GETPID)
        assert child.status("State").startswith("T (stopped)")
        os.kill(child.pid, signal.SIGCONT)
        assert system_call(child.pid, GETPID) == child.pid
        child.tell()
        assert child.heard() == "\n"


def test_a_thread_that_does_not_stop_is_a_deadline_and_is_let_go(tmp_path: Path) -> None:
    """It waits for a child that shares its memory (vfork), which the kernel does not break off for ptrace."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    opened = f"[(os.POSIX_SPAWN_OPEN, 0, {str(fifo)!r}, os.O_RDONLY, 0)]"
    script = f"say(0); os.waitpid(os.posix_spawn('/bin/true', ['true'], {{}}, file_actions={opened}), 0); say(hear())"
    with running(script) as child:
        child.heard()
        child.await_call(56, 58, 435)
        try:
            with pytest.raises(DeadlineError, match="does not stop"):
                system_call(child.pid, GETPID, seconds=0.2)
        finally:
            fifo.open("w").close()
        child.await_call(0)
        assert system_call(child.pid, GETPID) == child.pid
        child.tell()
        assert child.heard() == "\n"


def test_a_process_under_a_debugger_is_refused() -> None:
    with running("say(0); say(hear())") as child:
        child.heard()
        done = threading.Event()
        seized = threading.Event()

        def debug() -> None:
            ptrace.Tracee(child.pid, 0.0)
            seized.set()
            done.wait()

        debugger = threading.Thread(target=debug)
        debugger.start()
        seized.wait()
        try:
            with pytest.raises(RefusedError, match="is traced by process"):
                system_call(child.pid, GETPID)
        finally:
            done.set()
            debugger.join()
        child.tell()
        assert child.heard() == "\n"


def test_a_process_that_is_gone_is_unreachable() -> None:
    with running("say(0)") as child:
        child.heard()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(UnreachableError, match="is gone"):  # a zombie
            system_call(child.pid, GETPID)
    with pytest.raises(UnreachableError, match="is gone"):
        system_call(child.pid, GETPID)


# --- death at every step


def at_step(number: int, act: Callable[[], None]) -> Callable[[], int]:
    """Have every system call that the tracer makes on its tracee counted, and `act` called before the given one; the
    answer is a function that tells how many there were."""
    count = 0
    real_ptrace, real_wait, real_write = ptrace._call, os.waitpid, ptrace.Tracee.write

    def step() -> None:
        nonlocal count
        count += 1
        if count == number:
            act()

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            step()
            return real(*arguments, **options)

        return call

    ptrace._call = counted(real_ptrace)
    ptrace.os = type("os", (), {**vars(os), "waitpid": staticmethod(counted(real_wait))})  # type: ignore[assignment]
    ptrace.Tracee.write = counted(real_write)  # type: ignore[method-assign]
    return lambda: count


def in_a_fork(act: Callable[[], None]) -> int:
    """The wait status of a fork of this process that does it."""
    pid = os.fork()
    if not pid:
        try:
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def vectors(pid: int, mark: int | None = None) -> bytes:
    """The upper halves of a process's AVX registers, which are first set to a mark if one is given."""

    def look() -> bytes:
        tracee = ptrace.Tracee(pid, time.monotonic() + 10)
        try:
            tracee.interrupt()
            state = bytearray(tracee.extended_state())
            if mark is not None:
                state[512] |= 4  # XSTATE_BV: they are in use
                state[576:832] = bytes([mark]) * 256
                area = (ctypes.c_char * len(state)).from_buffer(state)
                tracee._regset(ptrace._SETREGSET, ptrace._NT_X86_XSTATE, area)
            return bytes(state[576:832])
        finally:
            ptrace.let_go(tracee)

    with ThreadPoolExecutor(1) as tracer:
        return tracer.submit(look).result()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# What a thread has beside its ordinary registers: a rounding mode in the control registers, a stack and a
# mask for signals.
STATE = """
libm = ctypes.CDLL("libm.so.6")
stack = ctypes.create_string_buffer(1 << 16)
libc.sigaltstack(struct.pack("=QQQ", ctypes.addressof(stack), 0, len(stack)), None)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
libm.fesetround(0x800)
def state():
    now, rounding = ctypes.create_string_buffer(24), libm.fegetround()
    libm.fesetround(0)
    libc.sigaltstack(None, now)
    libm.fesetround(0x800)
    return [now.raw.hex(), rounding, sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])))]
say(state())
say(%s)
say([state(), work(20000)])
say(hear())
"""


@pytest.mark.parametrize(
    ("script", "takes_it", "results"),
    [
        ("call('read', 0, ctypes.create_string_buffer(1), 1)", True, ([1, ""],)),
        # The one kind that is not made again: the kernel forgot how far it was. Any signal handler does the same to it.
        ("call('poll', struct.pack('=ihh', 0, 1, 0), 1, -1)", False, ([1, ""], [-1, "EINTR"])),
    ],
    ids=["read", "poll"],
)
def test_the_tracer_killed_before_any_of_its_steps(script: str, takes_it: bool, results: tuple[Any, ...]) -> None:
    """The process is in the middle of a system call, which goes on, and it computes right afterwards; what it is told
    last is heard, unless the call has taken it."""
    with running(STATE % "work(20000)") as child:
        _, right, _ = child.heard(), child.heard(), child.heard()
    avx = " avx " in Path("/proc/cpuinfo").read_text()
    steps, results_seen = 0, []
    while True:
        steps += 1
        with running(STATE % script) as child:
            state = child.heard()
            child.await_call(0, 7)
            marked = vectors(child.pid, mark=steps) if avx else b""

            def trace(pid: int = child.pid, step: int = steps) -> None:
                at_step(step, die)
                system_call(pid, GETPID)

            status = in_a_fork(trace)
            assert child.status("TracerPid") == "0"
            if avx and results == ([1, ""],):  # Nothing ran since but the kernel.
                child.await_call(0)
                assert vectors(child.pid) == marked
            assert system_call(child.pid, GETPID) == child.pid
            child.tell()
            result = child.heard()
            assert result in results
            results_seen.append(result)
            assert child.heard() == [state, right], steps
            if takes_it:
                child.tell()
            assert child.heard() == "\n"
        if os.WIFEXITED(status):
            break
    assert status == 0
    assert steps > 12
    assert results_seen[0] == results_seen[-1] == [1, ""]


def test_a_signal_before_any_of_the_steps() -> None:
    """It is delivered, once, and the system call is made all the same."""
    script = "signal.signal(signal.SIGUSR1, lambda *_: say('signal')); say(0); hear(); say('heard')"
    with running(script) as child:
        child.heard()
        for step in range(1, 100):
            child.await_call(0)
            before = child.descriptors()

            def trace(step: int = step) -> None:
                count = at_step(step, lambda: os.kill(child.pid, signal.SIGUSR1))
                assert system_call(child.pid, DUP, 0) > 2
                os._exit(0 if count() >= step else 7)

            status = os.waitstatus_to_exitcode(in_a_fork(trace))
            assert len(child.descriptors() - before) == 1
            if status == 7:
                break
            assert status == 0
            assert child.heard() == "signal"
        assert step > 12
        child.tell()
        assert child.heard() == "heard"


def test_the_process_killed_before_any_of_the_steps() -> None:
    for step in range(1, 100):
        with running("say(0); hear()") as child:
            child.heard()

            def trace(child: Child = child, step: int = step) -> None:
                at_step(step, lambda: os.kill(child.pid, signal.SIGKILL))
                try:
                    system_call(child.pid, GETPID)
                except UnreachableError:
                    os._exit(7)

            status = os.waitstatus_to_exitcode(in_a_fork(trace))
        if status == 0:
            break
        assert status == 7
    assert step > 12
