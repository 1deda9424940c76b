"""What every test stands on: no setting of the person who runs the tests reaches them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("no time as a verdict", deadline=None)
settings.load_profile("no time as a verdict")

SCRUBBED = ("LIBVIRT_", "HVCTL_", "XDG_")


@pytest.fixture(autouse=True, scope="session")
def scrubbed_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For fixtures that outlive a test."""
    with pytest.MonkeyPatch.context() as patch:
        _scrub(patch, tmp_path_factory.mktemp("home"))
        yield


@pytest.fixture(autouse=True)
def own_home(scrubbed_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each test: what it writes into its home is seen by no other."""
    _scrub(monkeypatch, tmp_path)


def _scrub(patch: pytest.MonkeyPatch, home: Path) -> None:
    for name in [n for n in os.environ if n.startswith(SCRUBBED)]:
        patch.delenv(name)
    patch.setenv("HOME", str(home))
    patch.setenv("XDG_CONFIG_HOME", str(home / ".config"))
