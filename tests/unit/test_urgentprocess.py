"""A process before all others while its guest is paused: its threads but those of vCPUs, and as before afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl.adapters.kernel.urgency import calm, urgent_process

OURS = os.SCHED_RR | os.SCHED_RESET_ON_FORK
# A main thread, a vCPU's and one that an operator gave a policy; each says its number.
CHILD = """
import os, sys, threading
def run(name, policy):
    open(f"/proc/self/task/{threading.get_native_id()}/comm", "w").write(name)
    if policy is not None:
        os.sched_setscheduler(0, policy, os.sched_param(0))
    os.write(1, b"%d\\n" % threading.get_native_id())
    threading.Event().wait()
print(os.getpid(), flush=True)
for name, policy in (("CPU 0/TCG", None), ("IO mon", os.SCHED_BATCH)):
    threading.Thread(target=run, args=(name, policy), daemon=True).start()
sys.stdin.read()
"""


def allowed() -> bool:
    with urgent_process(os.getpid()):
        return os.sched_getscheduler(0) == OURS


pytestmark = pytest.mark.skipif(not allowed(), reason="not allowed here")


@pytest.fixture
def threads() -> Iterator[dict[str, int]]:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(3)]
        names = {t: Path(f"/proc/{said[0]}/task/{t}/comm").read_text().strip() for t in said[1:]}
        yield {"main": said[0], **{name: thread for thread, name in names.items()}}
        process.kill()


def policies(threads: dict[str, int]) -> dict[str, int]:
    return {name: os.sched_getscheduler(thread) for name, thread in threads.items()}


def test_it_ends_as_it_began_whatever_happens(threads: dict[str, int]) -> None:
    before = policies(threads)
    assert before == {"main": os.SCHED_OTHER, "CPU 0/TCG": os.SCHED_OTHER, "IO mon": os.SCHED_BATCH}
    with pytest.raises(ZeroDivisionError), urgent_process(threads["main"]):
        with urgent_process(threads["main"]):
            pass
        assert policies(threads) == {**before, "main": OURS}
        raise ZeroDivisionError
    assert policies(threads) == before


def test_what_a_killed_one_left_is_calmed(threads: dict[str, int]) -> None:
    os.sched_setscheduler(threads["main"], OURS, os.sched_param(1))
    os.sched_setscheduler(threads["CPU 0/TCG"], os.SCHED_RR, os.sched_param(1))  # an operator's
    calm(threads["main"])
    assert policies(threads)["main"] == os.SCHED_OTHER
    assert policies(threads)["CPU 0/TCG"] == os.SCHED_RR


def test_where_it_is_not_allowed_and_where_it_is_gone_it_is_left(
    threads: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    before = policies(threads)
    with urgent_process(threads["main"]):
        assert policies(threads) == before
    monkeypatch.undo()
    with urgent_process(2**22 + 1):
        pass
