"""Migrations on both databases: the old schema or the new one, whatever happens, and never a guess."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, inspect, text
from sqlalchemy.pool import NullPool
from sqlmodel import SQLModel

from hvctl.adapters.store import schema, tables
from hvctl.adapters.store.store import Store
from hvctl.errors import RefusedError, UnreachableError
from hvctl.model.operation import OpState
from hvctl.model.prediction import Recorded
from tests.contract.stores import at_once, begin, database_url, migrated_store  # noqa: F401
from tests.postgresql import postgresql_cluster  # noqa: F401

HEAD = schema.revisions()[-1]
AFTER = "9000"
NEXT = f"""
import os, signal
import sqlalchemy as sa
from alembic import op
revision = "{AFTER}"
down_revision = "{HEAD}"
def upgrade():
    op.create_table("lease", sa.Column("id", sa.Integer(), primary_key=True))
    op.add_column("vm", sa.Column("class", sa.Text()))
    op.execute("UPDATE operation SET reason = 'migrated'")
    if os.environ.get("DIE"):
        os.kill(os.getpid(), signal.SIGKILL)
"""
MIGRATE = """
import sys
from pathlib import Path
from hvctl.adapters.store import schema
from hvctl.adapters.store.store import Store
schema.MIGRATIONS = Path(sys.argv[2])
Store(sys.argv[1]).migrate()
"""


@pytest.fixture(name="engine")
def engine_without_hvctl(url: str) -> Engine:
    """To look at the database from outside; it keeps no connection."""
    return create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool)


def migrations(folder: Path, **more: str) -> Path:
    copy = folder / "migrations"
    shutil.copytree(schema.MIGRATIONS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for name, source in more.items():
        (copy / "versions" / f"{name.lstrip('_')}.py").write_text(source)
    return copy


def migrate(url: str, folder: Path, *, die: bool = False) -> int:
    environment = os.environ | ({"DIE": "1"} if die else {})
    command = [sys.executable, "-B", "-c", MIGRATE, url, str(folder)]
    return subprocess.run(command, env=environment, timeout=60).returncode


def revision(engine: Engine) -> Any:
    with engine.connect() as connection:
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def test_the_migrations_make_what_the_tables_say(store: Store, engine: Engine) -> None:
    def not_an_index(item: object, name: str | None, kind: str, *_: object) -> bool:
        return kind != "index"

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "include_object": not_an_index})
        differences = compare_metadata(context, SQLModel.metadata)
    assert differences == []
    assert inspect(engine).get_foreign_keys(tables.STEP.name)
    indexes = {i["name"]: i["unique"] for i in inspect(engine).get_indexes(tables.OPERATION.name)}
    assert indexes == {"operation_one_open_per_vm": 1, "operation_key": 1, "operation_of_vm": 0, "operation_closed": 0}


def test_the_names_of_the_files_are_the_history(tmp_path: Path) -> None:
    config = Config()
    config.set_main_option("script_location", str(schema.MIGRATIONS))
    history = [s.revision for s in ScriptDirectory.from_config(config).walk_revisions()]
    assert history[::-1] == schema.revisions()


def test_migrating_twice_changes_nothing_and_does_not_even_import_alembic(store: Store, url: str) -> None:
    begin(store, "web")
    store.migrate()
    store.check_schema()
    again = (
        "import sys; from hvctl.adapters.store.store import Store\n"
        "s = Store(sys.argv[1]); s.migrate(); s.check_schema()\n"
        "assert len(s.operations()) == 1; assert 'alembic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", again, url], check=True, timeout=60)


def test_several_may_migrate_at_once(url: str) -> None:
    def ask(number: int) -> str:
        with Store(url) as mine:
            mine.migrate()
            return str(begin(mine, f"vm{number}").id)

    assert len(set(at_once(6, ask))) == 6


@pytest.mark.parametrize("unknown", ["9999", "000", "0001x"])
def test_a_newer_schema_is_refused_and_left_alone(store: Store, engine: Engine, unknown: str, tmp_path: Path) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :unknown"), {"unknown": unknown})
    for attempt in (store.migrate, store.check_schema):
        with pytest.raises(RefusedError, match=f"schema {unknown}, which is newer") as caught:
            attempt()
        assert "upgrade hvctl" in (caught.value.hint or "")
    assert revision(engine) == unknown
    assert not list(tmp_path.glob(f"state/*.{HEAD}*"))


def test_looking_at_an_empty_database_changes_nothing(url: str, engine: Engine, tmp_path: Path) -> None:
    with Store(url) as looking, pytest.raises((RefusedError, UnreachableError)) as caught:
        looking.check_schema()
    assert caught.value.hint
    if engine.dialect.name == "postgresql":
        assert inspect(engine).get_table_names() == []
    else:
        assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("death", ["first", "next"])
def test_a_migration_that_is_killed_did_not_happen(url: str, engine: Engine, death: str, tmp_path: Path) -> None:
    today = migrations(tmp_path / "today")
    newer = migrations(tmp_path / "newer", _9000_next=NEXT)
    if death == "next":
        assert migrate(url, today) == 0
        with Store(url) as before:
            begin(before, "web")
    assert migrate(url, newer, die=True) == -signal.SIGKILL

    names = set(inspect(engine).get_table_names())
    if death == "first":
        assert names == set()
    else:
        assert names == {"alembic_version", *SQLModel.metadata.tables}
        assert revision(engine) == HEAD
        assert "class" not in {c["name"] for c in inspect(engine).get_columns("vm")}
        with Store(url) as after:
            assert [o.reason for o in after.operations(state=OpState.OPEN)] == [None]

    assert migrate(url, newer) == 0
    assert revision(engine) == AFTER
    assert "lease" in inspect(engine).get_table_names()


def test_standings_of_before_are_those_of_peaks(url: str, engine: Engine, tmp_path: Path) -> None:
    before = migrations(tmp_path / "before")
    for name in schema.revisions()[schema.revisions().index("0007") :]:
        next((before / "versions").glob(f"{name}_*.py")).unlink()
    assert migrate(url, before) == 0
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO standing VALUES ('h', 'cpu', 'm1', 0.5, 1.0, 300, 12, true, 3000)"))
    with Store(url) as store:
        store.migrate()
        found = store.forecasts.standings("h")
    assert found == {("cpu", "peak"): Recorded("cpu", "peak", "m1", 0.5, 1.0, 300, 12, True, 3000)}


def test_an_upgrade_of_sqlite_leaves_a_private_copy_of_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "state" / "hvctl.db"
    url = f"sqlite:///{file}"
    newer = migrations(tmp_path / "newer", _9000_next=NEXT)
    with Store(url) as store:
        store.migrate()
        assert sorted(p.name for p in file.parent.iterdir()) == ["hvctl.db"]
        opened = begin(store, "web")
    old_mask = os.umask(0)
    try:
        assert migrate(url, newer) == 0
    finally:
        os.umask(old_mask)
    copy = file.with_name(f"hvctl.db.{HEAD}")
    assert sorted(p.name for p in file.parent.iterdir()) == ["hvctl.db", f"hvctl.db.{HEAD}"]
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    with Store(f"sqlite:///{copy}") as before:
        before.check_schema()
        assert before.operation(opened.id) == opened
    with closing(sqlite3.connect(file)) as after:
        assert after.execute("SELECT reason FROM operation").fetchall() == [("migrated",)]


def test_no_upgrade_without_room_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state" / "hvctl.db"
    with Store(f"sqlite:///{file}") as store:
        store.migrate()
        file.with_name(f"hvctl.db.{HEAD}").mkdir()  # stands in the way of the copy
        monkeypatch.setattr(schema, "MIGRATIONS", migrations(tmp_path / "newer", _9000_next=NEXT))
        with pytest.raises(UnreachableError, match=re.escape("cannot be copied before its upgrade")):
            store.migrate()
        monkeypatch.undo()
        store.check_schema()
    assert sorted(p.name for p in file.parent.iterdir()) == ["hvctl.db", f"hvctl.db.{HEAD}"]
