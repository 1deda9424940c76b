"""kill -9 of hvctl amid operations on a real VM, then `hvctl recover`: the contract of operations.md holds."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from host.outside import Guest, alive, await_true
from host.site import Site, await_stopped, ended

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
        site.ok("allocate", vm.name, "--vcpus", "1", "--memory", "256MiB", *none)
    assert in_force(vm) == before


@pytest.mark.parametrize("point", ["make_disks:after", "define:before", "define:after", "start:before", "start:after"])
def test_create_leaves_nothing_half_made(site: Site, point: str) -> None:
    killed(site, f"create:{point}", "vm", "create", site.name(), "--image", "micro", "--nic", site.bridge, "--start")
    assert recovered(site) == "undone"


@pytest.mark.parametrize(
    "point",
    [
        *("prepare_snapshot:before", "prepare_snapshot:after", "pause:after", "save_state:before", "save_state:after"),
        *("copy_ram:before", "copy_ram:after", "publish_snapshot:before", "publish_snapshot:after"),
        *("committed:after", "resume:before", "resume:after"),
    ],
)
def test_a_snapshot_is_whole_or_not_there(site: Site, vm: Guest, point: str) -> None:
    pid = vm.pid
    vm.mark("taken")
    killed(site, f"snapshot-take:{point}", "snapshot", "take", vm.name, "s")
    state = recovered(site)
    assert (vm.state, vm.pid, vm.marks()) == ("running", pid, ("taken", "taken"))
    names = [s["name"] for s in site.json("snapshot", "list", vm.name)]
    assert names == (["s"] if state == "done" else [])
    if names:
        vm.mark("spoiled")
        site.ok("reset", vm.name, "--to", "s")
        assert vm.marks() == ("taken", "taken")
        site.ok("snapshot", "delete", vm.name, "s")


@pytest.mark.parametrize("point", ["drop_snapshot:before", "drop_snapshot:after"])
def test_a_deleted_snapshot_is_gone(site: Site, vm: Guest, point: str) -> None:
    site.ok("snapshot", "take", vm.name, "s")
    killed(site, f"snapshot-delete:{point}", "snapshot", "delete", vm.name, "s")
    assert recovered(site) == "done"
    assert site.json("snapshot", "list", vm.name) == []


@pytest.fixture(scope="module")
def taken(site: Site, vm: Guest) -> None:
    vm.mark("old")
    site.ok("snapshot", "take", vm.name, "kept")


def assert_whole(guest: Guest, pid: int, marks: str) -> None:
    """The guest runs in the process it ran in, with files and RAM of one moment."""
    assert (guest.state, guest.pid) == ("running", pid)
    guest.await_answer()
    assert guest.marks() == (marks, marks)
    capabilities = {c["capability"]: c["state"] for c in guest.qmp("query-migrate-capabilities")}
    assert not capabilities["x-ignore-shared"]
    assert guest.qmp("query-jobs") == []


@pytest.mark.usefixtures("taken")
class TestReset:
    @pytest.mark.parametrize(
        ("point", "marks"),
        [
            *((p, "new") for p in ("begun:after", "pause:before", "pause:after", "touching:before")),
            *((p, "old") for p in ("touching:after", "restore_ram:before", "restore_ram:after", "load_state:before")),
            *((p, "old") for p in ("load_state:after", "committed:before", "committed:after", "resume:before")),
            *((p, "old") for p in ("resume:after", "set_record:after", "await_agent:before", "reseed:after")),
        ],
    )
    def test_a_reset_is_all_old_or_all_new(self, site: Site, vm: Guest, point: str, marks: str) -> None:
        pid = vm.pid
        vm.mark("new")
        killed(site, f"reset:{point}", "reset", vm.name, "--to", "kept")
        assert recovered(site) == ("undone" if marks == "new" else "done")
        assert_whole(vm, pid, marks)

    def test_a_recovery_may_be_killed_too(self, site: Site, vm: Guest) -> None:
        pid = vm.pid
        vm.mark("new")
        killed(site, "reset:restore_ram:after", "reset", vm.name, "--to", "kept")
        assert vm.state == "paused"
        killed(site, "recover-reset:load_state:after", "recover")
        assert vm.state == "paused"
        assert recovered(site) == "done"
        assert_whole(vm, pid, "old")

    def test_the_next_command_recovers_by_itself(self, site: Site, vm: Guest) -> None:
        pid = vm.pid
        vm.mark("new")
        killed(site, "reset:load_state:before", "reset", vm.name, "--to", "kept")
        site.ok("allocate", vm.name, "--cpu-quota", "90%")
        assert site.open_rows() == []
        assert_whole(vm, pid, "old")
        site.ok("allocate", vm.name, "--cpu-quota", "none")


@pytest.mark.parametrize("point", ["touching:after", "destroy:after", "undefine:before", "remove_files:before"])
def test_delete_is_finished(site: Site, point: str) -> None:
    guest = site.create()
    site.ok("vm", "start", guest.name)
    killed(site, f"delete:{point}", "vm", "delete", guest.name, "--force")
    assert recovered(site) == "done"
    assert guest.name not in {v["name"] for v in site.json("vm", "list")}


def test_qemu_killed_in_the_middle_of_a_reset(site: Site) -> None:
    """Nothing hangs, the reset is a failed one, and the VM starts again."""
    with site.created("--start") as guest:
        site.ok("snapshot", "take", guest.name, "s")
        reset = site.spawn("reset", guest.name, "--to", "s", fault="reset:load_state:before=stop")
        await_stopped(reset)
        pid = guest.pid
        os.kill(pid, signal.SIGKILL)
        await_true(lambda: not alive(pid) and guest.state == "shut off", "libvirt sees that QEMU is gone")
        reset.send_signal(signal.SIGCONT)
        status, said = ended(reset)
        assert status in (1, 3, 4, 9), said
        assert "Traceback" not in said
        site.ok("recover")
        assert site.open_rows() == []
        (last, *_) = site.json("operation", "list", "--vm", guest.name)
        assert last["kind"] == "reset"
        assert last["state"] == "failed"
        site.ok("vm", "start", guest.name)
        guest.await_boot()
        assert (site.json("snapshot", "list", guest.name), guest.tags(), guest.nodes()) == ([], [], [])
