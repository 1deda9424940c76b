"""Many rows at once: the statement is compiled once, and tuples go to the driver as they are. With an object per row,
the rows of a thousand VMs cost more than to measure them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Table, insert
from sqlalchemy.engine.default import DefaultDialect


def insert_rows(connection: Connection, table: Table, rows: Sequence[Sequence[Any]]) -> None:
    """Rows with a value for each column of the table, in their order; one that is there already stays as it is."""
    if not rows:
        return
    dialect = connection.dialect
    key = (dialect.name, table.name)
    if key not in _statements:
        # Positional on both: "?" is SQLite's own, "%s" one of those that psycopg takes.
        assert isinstance(dialect, DefaultDialect)
        style = type(dialect)(paramstyle="qmark" if dialect.name == "sqlite" else "format")
        _statements[key] = str(insert(table).compile(dialect=style)) + " ON CONFLICT DO NOTHING"
    connection.exec_driver_sql(_statements[key], [tuple(row) for row in rows])


_statements: dict[tuple[str, str], str] = {}
