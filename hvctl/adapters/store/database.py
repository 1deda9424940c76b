"""The database behind the store: how SQLite and PostgreSQL are opened, what a transaction is on each, and what their
errors mean. With tables, schema and store it is the one door to SQLAlchemy."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import QueuePool

from hvctl.errors import BusyError, HvctlError, RefusedError, UnreachableError, UsageError

WAIT = 5
"""Seconds to wait for a lock, a connection, or an answer to a connect."""

_URLS = "write sqlite:////var/lib/hvctl/hvctl.db or postgresql://user@host/name"
_BUSY_STATES = {"55P03", "40P01", "40001"}  # lock not available, deadlock, serialisation
_SQLITE_CAUSES = {
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened",
    sqlite3.SQLITE_PERM: "access is denied",
    sqlite3.SQLITE_READONLY: "it cannot be written",
    sqlite3.SQLITE_IOERR: "its disk fails",
    sqlite3.SQLITE_FULL: "its disk is full",
    sqlite3.SQLITE_CORRUPT: "it is damaged",
    sqlite3.SQLITE_NOTADB: "it is not an SQLite database",
}
_DENIED = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY)


def wal_is_safe(version: tuple[int, int, int]) -> bool:
    """Whether this SQLite has the fix of the WAL-reset bug, which corrupts a database that a daemon and a CLI share."""
    return version >= (3, 51, 3) or any(fixed <= version < (3, fixed[1] + 1, 0) for fixed in ((3, 50, 7), (3, 44, 6)))


class Database:
    """One database by URL; connects at the first transaction. May be shared by threads."""

    def __init__(self, url: str) -> None:
        try:
            parsed = make_url(url)
            backend = parsed.get_backend_name()
        except (ArgumentError, ValueError):
            raise UsageError("the database URL cannot be read.", _URLS) from None
        if parsed.host and "@" in parsed.host:
            # The rest of a password, which then would be told as a host's name.
            raise UsageError("the database URL has more than one @.", "write %40 for one in a password")
        named = (parsed.query.get(n) for n in ("password", "sslpassword"))
        self._secrets = [str(s) for s in (parsed.password, *named) if s]
        self.path: Path | None = None
        options: dict[str, Any] = {
            "hide_parameters": True,
            "poolclass": QueuePool,
            "pool_timeout": WAIT,
            "max_overflow": 0,
        }
        if backend == "sqlite" and parsed.database and parsed.database != ":memory:" and not parsed.query:
            self.path = Path(parsed.database)
            self.name = f"the database {self.path}"
            # One connection: threads queue for it in order, where SQLite's busy handler would make them poll.
            self.engine = create_engine("sqlite://", creator=self._open_sqlite, pool_size=1, **options)
        elif backend in ("postgresql", "postgres"):
            # Built anew, so that a password in the URL cannot come back in an error.
            self.name = f"the database {URL.create('postgresql', host=parsed.host, database=parsed.database)}"
            given = parsed.query.get("options", "")
            connect = {"connect_timeout": WAIT, "options": f"{given} -c lock_timeout={WAIT}s".strip()}
            target = parsed.set(drivername="postgresql+psycopg")
            try:
                self.engine = create_engine(target, connect_args=connect, pool_size=5, pool_pre_ping=True, **options)
            except ImportError as e:
                hint = "install it with: pip install 'hvctl[postgresql]'"
                raise UnreachableError(f"{self.name} needs psycopg, which is not installed.", hint) from e
        else:
            raise UsageError("the database URL is neither a file of SQLite nor a PostgreSQL database.", _URLS)
        event.listen(self.engine, "begin", _begin)

    def close(self) -> None:
        self.engine.dispose()

    def create_file(self) -> None:
        """Make SQLite's file (0600), and its folder (0700) if there is none; what exists stays as it is."""
        if self.path is None:
            return
        try:
            if self.path.exists():
                return
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Not open(): closing a descriptor would drop the locks that another thread's SQLite has on the file.
            os.mknod(self.path, 0o600)
        except FileExistsError:
            return
        except OSError as e:
            hint = "run as root, or name a writable place in HVCTL_STATE_DIR"
            raise UnreachableError(f"{self.name} cannot be made: {e.strerror}.", hint) from e

    def _open_sqlite(self) -> sqlite3.Connection:
        # mode=rw: only create_file creates. isolation_level=None: pysqlite starts no transaction of its own.
        uri = f"file:{quote(str(self.path))}?mode=rw"
        connection = sqlite3.connect(uri, uri=True, timeout=WAIT, isolation_level=None, check_same_thread=False)
        try:
            mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
            if mode == "wal" and not wal_is_safe(sqlite3.sqlite_version_info):
                raise RefusedError(
                    f"{self.name} is in WAL mode, which SQLite {sqlite3.sqlite_version} may corrupt.",
                    f"stop what uses it, then run: sqlite3 {self.path} 'PRAGMA journal_mode=DELETE'",
                )
            if mode != "wal":
                connection.execute("PRAGMA journal_mode=DELETE")
            connection.execute("PRAGMA synchronous=EXTRA")
            connection.execute("PRAGMA foreign_keys=ON")
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[Connection]:
        """All or nothing; errors of the library leave it as errors of hvctl. On SQLite a writing transaction is the
        only one of its kind from its first moment; on PostgreSQL that is what a locked row is for."""
        try:
            with self.engine.connect().execution_options(write=write) as connection, connection.begin():
                yield connection
        except PoolTimeoutError as e:
            raise BusyError(f"{self.name} is busy with other threads of this process.", "try again") from e
        except SQLAlchemyError as e:
            raise self._translated(e) from e

    def _translated(self, error: SQLAlchemyError) -> HvctlError:
        cause = error.orig if isinstance(error, DBAPIError) else None
        if isinstance(cause, sqlite3.Error):
            return self._sqlite_error(cause)
        text = " ".join(str(cause or type(error).__name__).split())
        for secret in self._secrets:
            text = text.replace(secret, "***")
        state: str | None = getattr(cause, "sqlstate", None)
        if state in _BUSY_STATES:
            return BusyError(f"{self.name} is locked by another operation: {text}.", "try again in a moment")
        if cause is not None and (state is None or state[:2] in ("08", "28", "3D", "53", "57", "42")):
            return UnreachableError(f"{self.name} cannot be used: {text}.", "check it with: hvctl doctor")
        return HvctlError(f"{self.name} refused a statement: {text}.", "check it with: hvctl doctor")

    def _sqlite_error(self, cause: sqlite3.Error) -> HvctlError:
        code = getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return BusyError(f"{self.name} is locked by another process.", f"see which one: fuser -v {self.path}")
        if code not in _SQLITE_CAUSES:
            return HvctlError(f"{self.name} refused a statement: {cause}.", "check it with: hvctl doctor")
        hint = "check it with: hvctl doctor"
        if code == sqlite3.SQLITE_CANTOPEN and self.path is not None and not os.path.lexists(self.path):
            return UnreachableError(f"{self.name} is not there.", "make it with: hvctl host prepare --yes")
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            hint = f"move it away and run: hvctl doctor --fix (the VMs are not touched); copies: {self.path}.*"
        elif code in _DENIED and os.geteuid() != 0:
            hint = "run hvctl as root"
        elif code == sqlite3.SQLITE_READONLY:
            hint = f"see whether its file system became read-only: findmnt -T {self.path}"
        elif code == sqlite3.SQLITE_FULL:
            hint = "make room on its disk and run the command again"
        return UnreachableError(f"{self.name} cannot be used: {_SQLITE_CAUSES[code]} ({cause}).", hint)


def _begin(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        write = connection.get_execution_options().get("write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
