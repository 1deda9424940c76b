"""The whole command on PostgreSQL: a change, a crash and its recovery, as on SQLite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from postgresql import Cluster, postgresql_cluster  # noqa: F401 - a fixture

from faults.command import FakeSite

pytestmark = pytest.mark.postgresql


@pytest.fixture
def site(tmp_path: Path, postgresql: Cluster) -> Iterator[FakeSite]:
    url = postgresql.create()
    made = FakeSite(tmp_path, url)
    made.world.add_vm("a")
    yield made
    postgresql.drop(url)


def test_a_change_is_in_the_journal(site: FakeSite) -> None:
    done = site.json("allocate", "a", "--vcpus", "2", "--memory", "512MiB")["operation"]
    assert done["state"] == "done"
    listed = site.json("operation", "list")["operations"]
    assert [(o["kind"], o["state"]) for o in listed] == [("allocate", "done")]
    shown = site.json("operation", "show", str(listed[0]["id"]))["operation"]
    assert [s["name"] for s in shown["steps"]] == ["set_memory", "set_vcpus", "set_record"]
    assert not (site.folder / "hvctl.db").exists()


def test_a_killed_change_is_undone_by_the_next_command(site: FakeSite) -> None:
    argv = ("allocate", "a", "--vcpus", "2", "--memory", "512MiB")
    assert site.run(*argv, fault="allocate:set_memory:after=kill").returncode == -9
    assert site.world.vm("a").allocation.memory == 512 << 20
    assert site.run("allocate", "a", "--cpu-weight", "50").returncode == 0
    states = [o["state"] for o in site.json("operation", "list")["operations"]]
    assert states == ["done", "undone"]
    assert site.world.vm("a").allocation.memory == 256 << 20
