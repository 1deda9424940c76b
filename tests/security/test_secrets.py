"""A password in the database URL, canary here, is in nothing that hvctl prints or keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.command import FakeSite
from host.loaded import Loaded

pytestmark = pytest.mark.processes

CANARY = "c4n4ry-S3CRET"
URLS = (
    f"postgresql://hvctl:{CANARY}@127.0.0.1:1/db",
    f"postgresql://hvctl@127.0.0.1:1/db?password={CANARY}",
    f"postgresql://127.0.0.1:1/db?user=x&password={CANARY}&sslpassword={CANARY}",
    f"postgresql://hvctl:{CANARY}?x@127.0.0.1:1/db",
    f"postgresql://hvctl:a@{CANARY}@127.0.0.1:1/db",
    f"postgresql://hvctl:{CANARY}/x@127.0.0.1:notaport/db",
    f"postgresql:/hvctl:{CANARY}@127.0.0.1/db",
    f"mysql://hvctl:{CANARY}@127.0.0.1/db",
    f"{CANARY}",
)
COMMANDS = (
    ("config", "show"),
    ("-f", "json", "config", "show"),
    ("-f", "csv", "config", "show"),
    ("operation", "list"),
    ("-v", "recover"),
    ("doctor", "--probe", "database", "--probe", "drift"),
    ("-f", "json", "doctor", "--probe", "database"),
    ("vm", "protect", "a"),
)


@pytest.mark.parametrize("url", URLS)
def test_t25_no_command_prints_the_password(url: str, tmp_path: Path) -> None:
    site = FakeSite(tmp_path)
    site.world.add_vm("a")
    for command in COMMANDS:
        done = Loaded({**site.environment, "HVCTL_DATABASE_URL": url}).run(*command)
        out = done.stdout + done.stderr
        assert CANARY not in out, (command, out)
        assert "Traceback" not in out, (command, out)
        if command[-2:] != ("config", "show"):
            assert done.returncode != 0, (command, out)


def test_t25_the_url_is_shown_as_far_as_it_is_no_secret(tmp_path: Path) -> None:
    site = FakeSite(tmp_path)
    for url, wanted in (
        (URLS[0], "postgresql://…@127.0.0.1:1/db"),
        (URLS[1], "postgresql://…@127.0.0.1:1/db"),
        (CANARY, "…"),
    ):
        done = Loaded({**site.environment, "HVCTL_DATABASE_URL": url}).run("config", "show")
        (line,) = (li for li in done.stdout.splitlines() if li.startswith("database_url"))
        assert line.split()[1] == wanted
