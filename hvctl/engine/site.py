"""One hypervisor and its journal, opened: what everything that is done there needs."""

from __future__ import annotations

import contextlib
import getpass
import os
import time
from collections.abc import Callable, Iterator

from hvctl.adapters.store.store import Store
from hvctl.decide.needs import promised_need
from hvctl.engine.execute import Progress
from hvctl.engine.faults import Faults
from hvctl.model.host import HostFacts
from hvctl.model.pool import Need
from hvctl.model.vm import Vm
from hvctl.ports import Host
from hvctl.settings import Settings


class Site:
    """Opened for one command or one daemon.

    needs(vm, gap) predicts what a VM needs when it comes back after `gap` seconds; clock is seconds since 1970, which
    reservations are kept by, since they outlive every process and boot."""

    def __init__(self, settings: Settings, host: Host, store: Store, progress: Progress = lambda _: None) -> None:
        self.settings = settings
        self.host = host
        self.store = store
        self.progress = progress
        self.faults = Faults()
        self.facts: HostFacts = host.domains.facts()
        self.needs: Callable[[Vm, float], Need] = promised_need
        self.clock: Callable[[], float] = time.time
        self.who = os.environ.get("SUDO_USER") or _user()

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Whatever becomes of an operation, its QEMU process is let go."""
        try:
            yield
        finally:
            self.host.machine.release()


def _user() -> str:
    try:
        return getpass.getuser()
    except KeyError:  # in a container a uid may have no name
        return str(os.geteuid())
