"""A thread before all others of the host, where that is allowed, and as it was afterwards."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from hvctl.adapters.kernel.urgency import urgent


def is_urgent(thread: int = 0) -> bool:
    return os.sched_getscheduler(thread) & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR


def allowed() -> bool:
    with urgent():
        return is_urgent()


def test_it_ends_as_it_began() -> None:
    before = os.sched_getscheduler(0)
    assert not is_urgent()
    with pytest.raises(ZeroDivisionError), urgent():
        with urgent():
            pass
        assert is_urgent() == allowed()
        raise ZeroDivisionError
    assert os.sched_getscheduler(0) == before


@pytest.mark.skipif(not allowed(), reason="not allowed here")
def test_another_thread_is_urgent_before_it_has_work_and_as_it_was_afterwards() -> None:
    with ThreadPoolExecutor(1) as pool:
        thread = pool.submit(threading.get_native_id).result()
        with urgent(thread):
            assert is_urgent(thread)
            assert not is_urgent()
            assert pool.submit(is_urgent).result()
        assert not is_urgent(thread)


@pytest.mark.skipif(not allowed(), reason="not allowed here")
def test_what_is_started_meanwhile_is_not_urgent() -> None:
    with urgent(), ThreadPoolExecutor(1) as pool:
        assert is_urgent()
        assert not pool.submit(is_urgent).result()


def test_where_it_is_not_allowed_it_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    done = []
    with urgent():
        done.append(is_urgent())
    assert done == [False]
