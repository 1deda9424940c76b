"""Keeps the host's processors out of their idle states while a guest is paused: a pause is a chain of short waits of
hvctl and QEMU for each other, and after each of them a processor that slept would have to wake up first."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_QOS: Final = Path("/dev/cpu_dma_latency")
_NONE_AT_ALL: Final = struct.pack("=i", 0)  # microseconds that waking up may take


@contextmanager
def awake(qos: Path = _QOS) -> Iterator[None]:
    """The kernel holds to what was written for as long as the file is open, so a killed hvctl leaves nothing behind;
    where it offers no such file, or not to us, its processors sleep as before."""
    try:
        asked = os.open(qos, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            os.write(asked, _NONE_AT_ALL)
        yield
    finally:
        os.close(asked)
