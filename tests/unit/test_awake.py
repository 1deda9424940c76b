"""Processors that stay awake for the length of a pause: the kernel is asked with a file that is open meanwhile."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from hvctl.adapters.kernel.awake import awake


def holds(path: Path) -> bool:
    return any(fd.resolve() == path for fd in Path("/proc/self/fd").iterdir())


def test_the_kernel_is_asked_for_no_latency_as_long_as_it_lasts(tmp_path: Path) -> None:
    qos = tmp_path / "qos"
    qos.write_bytes(b"")
    with pytest.raises(ZeroDivisionError), awake(qos):
        assert struct.unpack("=i", qos.read_bytes()) == (0,)
        assert holds(qos)
        raise ZeroDivisionError
    assert not holds(qos)


def test_a_host_without_it_is_left_as_it_is(tmp_path: Path) -> None:
    with awake(tmp_path / "none"):
        assert not holds(tmp_path / "none")
    assert not (tmp_path / "none").exists(), "and nothing is made in its place"
