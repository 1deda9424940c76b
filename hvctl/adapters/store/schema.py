"""Which schema a database has, and bringing it to this code's: one transaction, so it is the old one or the new one.

Alembic is imported only when there is something to migrate: every command asks, and almost none has to.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import Connection, text

from hvctl.adapters.store.database import Database
from hvctl.errors import RefusedError, UnreachableError

MIGRATIONS = Path(__file__).parents[2] / "migrations"
_MIGRATION_LOCK = 0x6876_6374  # any number that no other advisory lock of this database uses


def revisions() -> list[str]:
    """Every revision this code knows, oldest first: migrations/versions/<revision>_<title>.py."""
    return sorted(p.name.partition("_")[0] for p in (MIGRATIONS / "versions").glob("[0-9]*.py"))


def check_schema(database: Database) -> None:
    """Change nothing; RefusedError unless the schema is exactly this code's."""
    with database.transaction(write=False) as connection:
        found = _revision(connection)
    if found is None:
        raise RefusedError(f"{database.name} is empty.", "make its tables with: hvctl host prepare --yes")
    if _known(database, found) != revisions()[-1]:
        raise RefusedError(
            f"{database.name} has schema {found}, and this hvctl needs {revisions()[-1]}.",
            "upgrade it with: hvctl host prepare --yes",
        )


def migrate(database: Database) -> None:
    """Bring the schema to this code's. RefusedError if it is newer; an older SQLite file is copied beside itself."""
    database.create_file()
    head = revisions()[-1]
    with database.transaction(write=False) as connection:
        if _known(database, _revision(connection)) == head:
            return
    with database.transaction(write=True) as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
        found = _known(database, _revision(connection))
        if found == head:
            return
        if found is not None and database.path is not None:
            _copy(database, database.path, found)
        _upgrade(connection)


def _revision(connection: Connection) -> str | None:
    if not connection.dialect.has_table(connection, "alembic_version"):
        return None
    found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return found


def _known(database: Database, revision: str | None) -> str | None:
    if revision is not None and revision not in revisions():
        raise RefusedError(
            f"{database.name} has schema {revision}, which is newer than this hvctl ({revisions()[-1]}).",
            "upgrade hvctl on this machine to the version that the others run",
        )
    return revision


def _copy(database: Database, path: Path, revision: str) -> None:
    """The file as it is, beside it. Read through another connection while the migration's transaction keeps writers
    out and has not written yet."""
    target = path.with_name(f"{path.name}.{revision}")
    partial = path.with_name(f"{target.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        os.mknod(partial, 0o600)
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(partial)) as copy:
            source.backup(copy)
        partial.replace(target)
    except (OSError, sqlite3.Error) as e:
        partial.unlink(missing_ok=True)
        hint = "make room beside it and run the command again"
        raise UnreachableError(f"{database.name} cannot be copied before its upgrade: {e}.", hint) from e


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
