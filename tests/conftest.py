"""What every test stands on: no setting of the person who runs the tests reaches them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import Phase, settings

# No time is a verdict. The same examples in every run, so that a change is judged by itself; `make explore` has others.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
# Whether something fails is all that is asked of a planted bug: no smaller example of it is looked for.
settings.register_profile("planted", deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
settings.load_profile(next((p for p in ("explore", "planted") if os.environ.get(f"HVCTL_{p.upper()}")), "same"))

# The longest files, which would otherwise be what one process still runs when the others have nothing left.
FIRST = ("test_reset_kills", "test_soak", "test_command_interrupt", "test_save_load", "test_command_life")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


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
