"""kill -9 of hvctl amid operations on a real VM, then `hvctl recover`: all of it is old, or all of it is new.

Snapshots and resets have their own, in test_reset_kills.py.
"""

from __future__ import annotations

import signal
from typing import Any

import pytest

from host.outside import Guest
from host.site import Site

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]

ALLOCATE = (
    *("--vcpus", "2", "--memory", "320MiB", "--cpu-quota", "150%", "--cpu-weight", "200"),
    *("--iops", "500", "--net-in", "8Mbit", "--net-out", "4Mbit"),
)
NEW = {"memory": 320 << 20, "cpu": (200, 150), "rates": {"in": 8_000_000, "out": 4_000_000}, "iops": "500", "online": 2}


def killed(site: Site, point: str, *argv: str) -> None:
    done = site.run(*argv, fault=f"{point}=kill")
    assert done.returncode == -signal.SIGKILL, (point, done.returncode, done.stdout, done.stderr)
    assert "done" not in done.stdout


def recovered(site: Site) -> str:
    """How the one open operation ended; none may be open after it."""
    opened = site.open_rows()
    ended_now = site.json("recover")
    assert site.open_rows() == []
    if not opened:
        assert ended_now == []
        return "done"
    assert [o["id"] for o in ended_now] == opened
    return str(ended_now[0]["state"])


def in_force(guest: Guest) -> dict[str, Any]:
    tuning = guest.stats("blkdeviotune", "vda", "--live")
    return {
        "memory": guest.memory(),
        "cpu": guest.cpu(),
        "rates": guest.rates(),
        "iops": tuning["total_iops_sec"],
        "online": guest.online(),
    }


@pytest.fixture(scope="module")
def before(vm: Guest) -> dict[str, Any]:
    return in_force(vm)


@pytest.mark.parametrize(
    "point",
    [
        *("row:after", "begun:after", "touching:before", "touching:after"),
        *("set_cpu_quota:after", "set_memory:before", "set_memory:after", "set_vcpus:before", "set_vcpus:after"),
        *("set_disk_limit:after", "set_nic_limit:before", "set_nic_limit:after", "set_record:before"),
        *("set_record:after", "closed:after"),
    ],
)
def test_allocate_is_all_old_or_all_new(site: Site, vm: Guest, before: dict[str, Any], point: str) -> None:
    killed(site, f"allocate:{point}", "allocate", vm.name, *ALLOCATE)
    state = recovered(site)
    assert in_force(vm) == (NEW if state == "done" else before)
    if state == "done":
        none = [w for o in ("--cpu-quota", "--cpu-weight", "--iops", "--net-in", "--net-out") for w in (o, "none")]
        vm.await_report()
        site.ok("allocate", vm.name, "--vcpus", "1", "--memory", "256MiB", *none)
    assert in_force(vm) == before


@pytest.mark.parametrize("point", ["make_disks:after", "define:before", "define:after", "start:before", "start:after"])
def test_create_leaves_nothing_half_made(site: Site, point: str) -> None:
    killed(site, f"create:{point}", "vm", "create", site.name(), "--image", "micro", "--nic", site.bridge, "--start")
    assert recovered(site) == "undone"


@pytest.mark.parametrize("point", ["touching:after", "destroy:after", "undefine:before", "remove_files:before"])
def test_delete_is_finished(site: Site, point: str) -> None:
    guest = site.create()
    site.ok("vm", "start", guest.name)
    killed(site, f"delete:{point}", "vm", "delete", guest.name, "--force")
    assert recovered(site) == "done"
    assert guest.name not in {v["name"] for v in site.json("vm", "list")}
