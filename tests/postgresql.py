"""A PostgreSQL cluster of Debian for the tests: on a socket in its own temporary folder, gone with the tests.

A test that needs one is marked `postgresql`, asks for the fixture `postgresql`, and its module imports
postgresql_cluster, which is that fixture.
"""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest

DEADLINE = 60


@dataclass
class Cluster:
    """A running cluster. `create` gives each test a database of its own."""

    folder: Path
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.folder}"

    def create(self) -> str:
        """The URL of a new, empty database."""
        name = f"test{next(self._numbers)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)

    def drop(self, url: str) -> None:
        """Remove a database, whoever is still connected."""
        name = url.split("?")[0].rpartition("/")[2]
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def _programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.fail("PostgreSQL is not installed: apt-get install postgresql, or run with -m 'not postgresql'")
    return found[-1].parent


@pytest.fixture(scope="session", name="postgresql")
def postgresql_cluster() -> Iterator[Cluster]:
    programs = _programs()
    folder = Path(tempfile.mkdtemp(prefix="hvctl-pg-"))
    # It refuses root; and it must not outlive the tests, even when they are killed.
    owner = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
    become = ["setpriv", "--pdeathsig", "QUIT"]
    if owner is not None:
        become += [f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--init-groups"]
        os.chown(folder, owner.pw_uid, owner.pw_gid)
    try:
        make = [programs / "initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"]
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
        subprocess.run([*become, *make], check=True, capture_output=True, cwd=folder, env=environment, timeout=DEADLINE)
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(folder),
            "fsync": "off",
            "log_min_messages": "log",
            "log_checkpoints": "off",
            "max_connections": "120",
        }
        start = [programs / "postgres", "-D", folder / "data"]
        start += [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        server = subprocess.Popen(
            [*become, *start], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment
        )
        try:
            assert server.stderr is not None
            said = []
            for line in server.stderr:
                said.append(line)
                if "ready to accept connections" in line:
                    break
            else:
                pytest.fail("PostgreSQL did not start: " + "".join(said))
            yield Cluster(folder)
        finally:
            server.send_signal(signal.SIGQUIT)
            server.communicate(timeout=DEADLINE)
    finally:
        shutil.rmtree(folder)
