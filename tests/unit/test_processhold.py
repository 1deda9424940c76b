"""A process that is worked on is the very one that was observed, whoever has its pid by then."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from hvctl.adapters.kernel.process import boot_id, start_time
from hvctl.adapters.kernel.processhold import held
from hvctl.errors import UnreachableError
from hvctl.model.vm import Process


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as started:
        yield started
        started.kill()


def observed(pid: int) -> Process:
    return Process(pid, start_time(pid) or 0, boot_id())


def test_another_process_with_its_pid_is_not_it() -> None:
    me = observed(os.getpid())
    with held(me, "a") as alive:
        alive()
    for other in (replace(me, start_time=me.start_time - 1), replace(me, boot_id="of another boot")):
        with pytest.raises(UnreachableError, match=f"{me.pid} of a is gone"):
            held(other, "a").__enter__()


def test_its_end_is_seen(child: subprocess.Popen[bytes]) -> None:
    before = observed(child.pid)
    with held(before, "a") as alive:
        alive()
        child.kill()
        child.wait()
        with pytest.raises(UnreachableError):
            alive()
    with pytest.raises(UnreachableError):
        held(before, "a").__enter__()
