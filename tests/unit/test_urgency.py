"""A thread before all others of the host, where that is allowed, and as it was afterwards."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from hvctl.adapters.kernel.urgency import is_urgent, urgent


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
