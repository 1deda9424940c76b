"""A QEMU process held by a descriptor, so that its pid cannot pass to another process while it is worked on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hvctl.adapters.kernel import process
from hvctl.errors import UnreachableError
from hvctl.model.vm import Process


@contextmanager
def held(life: Process, name: str) -> Iterator[Callable[[], None]]:
    """Hold the very process that was observed; yields a check that it still lives. UnreachableError: it is gone."""

    def gone() -> UnreachableError:
        return UnreachableError(f"the QEMU process {life.pid} of {name} is gone.", f"hvctl vm show {name}")

    try:
        fd = os.pidfd_open(life.pid)
    except ProcessLookupError as e:
        raise gone() from e
    try:
        if process.start_time(life.pid) != life.start_time or process.boot_id() != life.boot_id:
            raise gone()

        def alive() -> None:
            try:
                signal.pidfd_send_signal(fd, 0)
            except ProcessLookupError as e:
                raise gone() from e

        yield alive
    finally:
        os.close(fd)
