"""A host that is only data: the same ports as the real one, for tests of every fault and simulations of many VMs.

`fake:///path/state.json` names it; FakeWorld is the hand of everybody else who works on that host.
"""

from __future__ import annotations

from pathlib import Path

from hvctl.adapters.fake.archives import FakeArchives
from hvctl.adapters.fake.domains import FakeDomains
from hvctl.adapters.fake.file import WorldFile
from hvctl.adapters.fake.machine import FakeMachine
from hvctl.adapters.fake.meter import FakeMeter
from hvctl.adapters.fake.network import FakeNetwork, FakeStorage
from hvctl.adapters.fake.world import FakeWorld
from hvctl.errors import UsageError
from hvctl.ports import Host

__all__ = ["FakeWorld", "open_fake"]


def open_fake(uri: str) -> Host:
    """The host of `fake:///absolute/path.json`; an empty one where no file is yet."""
    path = Path(uri.removeprefix("fake://"))
    if not uri.startswith("fake://") or not path.is_absolute():
        raise UsageError(f"{uri!r} does not name a fake host.", "write it like fake:///path/to/state.json")
    file = WorldFile(path)
    return Host(
        FakeDomains(file), FakeNetwork(file), FakeStorage(file), FakeMachine(file), FakeArchives(file), FakeMeter(file)
    )
