"""A fake host with a journal that is migrated already: migrating costs more than most of these tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.command import FakeSite

from hvctl.adapters.fake import open_fake
from hvctl.adapters.store.store import Store
from hvctl.engine.operate import Engine


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of this version."""
    path = tmp_path_factory.mktemp("journal") / "hvctl.db"
    with Store(f"sqlite:///{path}") as store:
        store.migrate()
    return path


@pytest.fixture
def site(tmp_path: Path, migrated: Path) -> FakeSite:
    (tmp_path / "site").mkdir(mode=0o700)
    shutil.copy(migrated, tmp_path / "site" / "hvctl.db")
    return FakeSite(tmp_path / "site")


@pytest.fixture
def engine(site: FakeSite) -> Iterator[Engine]:
    with Store(site.settings.database) as store:
        yield Engine(site.settings, open_fake(site.world.uri), store)
