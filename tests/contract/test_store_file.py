"""What can be wrong with a database before any question is asked (URL, file, server), and who may read it."""

from __future__ import annotations

import os
import sqlite3
import stat
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from hvctl.adapters.store import database
from hvctl.adapters.store.database import Database, wal_is_safe
from hvctl.adapters.store.store import Store
from hvctl.errors import HvctlError, RefusedError, UnreachableError, UsageError
from hvctl.model.host import Ledger
from tests.contract.stores import begin
from tests.postgresql import Cluster, postgresql_cluster  # noqa: F401

NOBODY = 65534


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(name="file")
def database_file(tmp_path: Path) -> Path:
    """A migrated database with one operation, closed by everybody."""
    path = tmp_path / "state" / "hvctl.db"
    with Store(f"sqlite:///{path}") as store:
        store.migrate()
        begin(store, "web")
    return path


@contextmanager
def nobody() -> Iterator[None]:
    """Root may write everywhere, so the tests of what is denied are somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_the_file_its_journal_and_its_folder_are_private(tmp_path: Path) -> None:
    path = tmp_path / "state" / "hvctl.db"
    seen: list[int] = []

    def look(ledger: Ledger) -> None:
        seen.append(mode(path.with_name("hvctl.db-journal")))

    old_mask = os.umask(0)
    try:
        with Store(f"sqlite:///{path}") as store:
            store.migrate()
            begin(store, "web", admit=look)
    finally:
        os.umask(old_mask)
    assert (mode(path), mode(path.parent), seen) == (0o600, 0o700, [0o600])


def test_an_existing_folder_stays_as_it_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with Store(f"sqlite:///{tmp_path}/a#b c.db") as store:
        store.migrate()
    assert mode(tmp_path) == 0o755
    assert [(p.name, mode(p)) for p in tmp_path.glob("a*")] == [("a#b c.db", 0o600)]


def test_rows_are_durable_and_foreign_keys_hold_and_the_journal_is_not_a_wal(file: Path) -> None:
    with closing(sqlite3.connect(file)) as other:
        opened = Database(f"sqlite:///{file}")
        with opened.transaction(write=True) as connection:
            found = [connection.execute(text(f"PRAGMA {p}")).scalar() for p in ("synchronous", "foreign_keys")]
            assert found == [3, 1]
            assert connection.execute(text("PRAGMA journal_mode")).scalar() == "delete"
        opened.close()
        assert other.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert [p.name for p in file.parent.iterdir()] == ["hvctl.db"]


@pytest.mark.parametrize(
    ("version", "safe"),
    [
        ((3, 40, 1), False),
        ((3, 44, 5), False),
        ((3, 44, 6), True),
        ((3, 45, 0), False),
        ((3, 50, 6), False),
        ((3, 50, 7), True),
        ((3, 51, 0), False),
        ((3, 51, 2), False),
        ((3, 51, 3), True),
        ((3, 52, 0), True),
        ((4, 0, 0), True),
    ],
)
def test_wal_is_safe_only_with_the_fix(version: tuple[int, int, int], safe: bool) -> None:
    assert wal_is_safe(version) is safe


def test_a_file_in_wal_mode_is_refused_unless_that_is_safe(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(sqlite3.connect(file)) as other:
        assert other.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
    for safe in (False, True):
        monkeypatch.setattr(database, "wal_is_safe", lambda version, safe=safe: safe)
        with Store(f"sqlite:///{file}") as store:
            if safe:
                assert len(store.operations()) == 1
                continue
            with pytest.raises(RefusedError, match="WAL") as caught:
                store.operations()
            assert f"sqlite3 {file} 'PRAGMA journal_mode=DELETE'" in (caught.value.hint or "")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "hvctl.db"
    path.write_bytes(b"not a database" * 1000)
    with Store(f"sqlite:///{path}") as store:
        for attempt in (store.migrate, store.check_schema, store.operations):
            with pytest.raises(UnreachableError, match="not an SQLite database") as caught:
                attempt()
            assert caught.value.hint
    assert path.read_bytes() == b"not a database" * 1000


def test_a_damaged_file(file: Path) -> None:
    with file.open("r+b") as raw:
        raw.seek(4096)
        raw.write(b"\xa5" * (file.stat().st_size - 4096))
    with Store(f"sqlite:///{file}") as store, pytest.raises(UnreachableError, match="damaged"):
        store.operations()


def test_a_truncated_file(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)
    with Store(f"sqlite:///{file}") as store, pytest.raises(UnreachableError, match="damaged"):
        begin(store, "db")


def test_a_file_that_is_gone_is_not_made_anew_by_a_question(file: Path) -> None:
    file.unlink()
    with Store(f"sqlite:///{file}") as store, pytest.raises(UnreachableError, match="is not there"):
        begin(store, "db")
    assert not file.exists()


def test_a_folder_that_may_only_be_read(file: Path) -> None:
    with Store(f"sqlite:///{file}") as store:
        begin(store, "db")  # also imports what another user could not
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / "hvctl.db"
        there.write_bytes(file.read_bytes())
        there.chmod(0o666)
        Path(folder).chmod(0o555)
        with nobody(), Store(f"sqlite:///{there}") as store, Store(f"sqlite:///{folder}/new.db") as new:
            assert len(store.operations()) == 2
            with pytest.raises(UnreachableError, match=r"cannot be (opened|written)"):
                begin(store, "cache")
            with pytest.raises(UnreachableError, match="cannot be made: Permission denied"):
                new.migrate()
        there.chmod(0o444)
        with nobody(), Store(f"sqlite:///{there}") as store:
            with pytest.raises(UnreachableError, match="cannot be written"):
                begin(store, "cache")
        Path(folder).chmod(0)
        with nobody(), Store(f"sqlite:///{there}") as store:
            with pytest.raises(UnreachableError):
                store.migrate()
        Path(folder).chmod(0o700)


def test_a_full_disk_changes_nothing_and_the_same_request_succeeds_later(file: Path) -> None:
    with Store(f"sqlite:///{file}") as store:
        with store._database.engine.connect() as connection:
            pages = connection.execute(text("PRAGMA page_count")).scalar()
            connection.execute(text(f"PRAGMA max_page_count={pages}"))
        large = {"text": "x" * 100_000}
        with pytest.raises(UnreachableError, match="full"):
            begin(store, "db", key="k", request=large)
        with store._database.engine.connect() as connection:
            connection.execute(text("PRAGMA max_page_count=1000000"))
        assert begin(store, "db", key="k", request=large).id == store.operations()[0].id


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://hv:s3cret@127.0.0.1:1/hvctl",
        "postgres://hv:s3cret@127.0.0.1:1/hvctl",
        "postgresql://127.0.0.1:1/hvctl?user=hv&password=s3cret",
        "postgresql://hv:s3cret@127.0.0.1:port/hvctl",
        "mysql://hv:s3cret@127.0.0.1/hvctl",
        "hv:s3cret@127.0.0.1",
        "sqlite://hv:s3cret@/",
    ],
)
def test_a_password_is_in_no_error(url: str) -> None:
    with pytest.raises((UnreachableError, UsageError)) as caught, Store(url) as store:
        store.migrate()
    assert caught.value.hint
    shown = "".join(traceback.format_exception(caught.value)) + str(caught.value.hint)
    assert "s3cret" not in shown


@pytest.mark.parametrize("url", ["", "sqlite://", "sqlite:///:memory:", "sqlite:///x.db?mode=ro", "x.db"])
def test_a_url_that_is_neither_a_file_nor_a_server(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        Store(url)
    assert "postgresql://" in (caught.value.hint or "")


@pytest.mark.postgresql
def test_a_database_that_the_server_does_not_have(postgresql: Cluster) -> None:
    with Store(postgresql.url("absent")) as store, pytest.raises(UnreachableError, match="absent"):
        store.migrate()


@pytest.mark.postgresql
def test_a_connection_that_the_server_ended_is_made_again(postgresql: Cluster) -> None:
    url = postgresql.create()
    with Store(url) as store, Store(url) as other:
        store.migrate()
        begin(store, "web")
        with other._database.transaction(write=True) as connection:
            connection.execute(
                text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
            )
        assert len(store.operations()) == 1

        def end(ledger: Ledger) -> None:
            with other._database.transaction(write=True) as connection:
                connection.execute(
                    text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
                )

        with pytest.raises(HvctlError) as caught:
            begin(store, "db", admit=end)
        assert isinstance(caught.value, UnreachableError)
        assert len(store.operations()) == 1
    postgresql.drop(url)
