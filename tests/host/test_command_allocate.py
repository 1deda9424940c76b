"""allocate on a running VM: every option, seen by virsh, the guest and the kernel, and taken back."""

from __future__ import annotations

import json
import subprocess

import pytest

from host.outside import KIB, MIB, Guest, await_true, virsh
from host.site import Site

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]

NONE = ("--cpu-quota", "--cpu-weight", "--net-in", "--net-out", "--iops", "--disk-rate")
BURST = ("--iops-burst", "--disk-burst", "--burst-seconds")


def tuned(guest: Guest) -> dict[str, int]:
    """What the running QEMU limits its disk to, without what it does not."""
    tuning = guest.stats("blkdeviotune", "vda", "--live")
    return {key: int(value) for key, value in tuning.items() if value.isdigit() and int(value)}


def promised(guest: Guest) -> dict[str, object]:
    """The record in the definition's metadata."""
    (found,) = (e for e in guest.xml(inactive=True).iterfind("metadata/*") if "hvctl" in e.tag)
    allocation: dict[str, object] = json.loads(found.text or "")["allocation"]
    return allocation


def test_everything_at_once_and_back(site: Site, vm: Guest) -> None:
    small = vm.mem_total()
    grown = site.ok(
        *("allocate", vm.name, "--vcpus", "2", "--memory", "384MiB", "--cpu-quota", "150%", "--cpu-weight", "200"),
        *("--net-in", "8Mbit", "--net-out", "4Mbit", "--nic", vm.tap),
        *("--iops", "500", "--disk-rate", "50MiB", "--iops-burst", "1000", "--disk-burst", "100MiB"),
        *("--burst-seconds", "5", "--disk", "data", "--diff"),
    )
    for line in ("vcpus: 1 -> 2", "memory: 256 MiB -> 384 MiB", "cpu_quota: - -> 150%", "iops vda: - -> 500"):
        assert f"  {line}\n" in grown
    assert vm.online() == 2
    assert vm.mem_total() - small == 128 * MIB == vm.memory() - 256 * MIB
    assert vm.memory("--config") == 384 * MIB
    assert vm.cpu() == (200, 150)
    assert vm.rates() == {"in": 8_000_000, "out": 4_000_000}
    assert tuned(vm) == {
        **{"total_iops_sec": 500, "total_bytes_sec": 50 * MIB, "total_iops_sec_max": 1000},
        **{"total_bytes_sec_max": 100 * MIB, "total_iops_sec_max_length": 5, "total_bytes_sec_max_length": 5},
    }
    record = promised(vm)
    assert (record["vcpus"], record["memory"], record["cpu_quota"]) == (2, 384 * MIB, 150)
    assert site.show(vm)["allocation"] == record

    bare = [word for option in (*NONE, *BURST) for word in (option, "none")]
    vm.await_report()
    site.ok("allocate", vm.name, "--vcpus", "1", "--memory", "256MiB", *bare)
    assert (vm.online(), vm.mem_total(), vm.memory()) == (1, small, 256 * MIB)
    assert (vm.cpu(), vm.rates(), tuned(vm)) == ((100, None), {}, {})


def test_a_dry_run_changes_nothing_and_its_status_tells(site: Site, vm: Guest) -> None:
    command = ("allocate", vm.name, "--cpu-quota", "50%", "--iops", "100", "--dry-run", "--exit-code")
    planned = site.run("-f", "json", *command, "--diff")
    assert planned.returncode == 10
    plan = json.loads(planned.stdout)["operation"]
    assert [s["step"] for s in plan["plan"]] == ["set_cpu_quota", "set_disk_limit", "set_record"]
    assert {"what": "cpu_quota", "before": "-", "after": "50%"} in plan["diff"]
    assert (vm.cpu(), tuned(vm)) == ((100, None), {})
    assert site.run("allocate", vm.name, "--vcpus", "1", "--dry-run", "--exit-code").returncode == 0
    assert "nothing to do" in site.ok("allocate", vm.name, "--vcpus", "1")


@pytest.mark.parametrize(
    ("status", "options"),
    [
        (2, ()),
        (2, ("--memory", "512")),
        (2, ("--net-in", "20")),
        (2, ("--cpu-quota", "150")),
        (2, ("--iops", "many")),
        (2, ("--vcpus", "2", "--exit-code")),
        (5, ("--vcpus", "5")),
        (5, ("--memory", "2GiB")),
        (5, ("--nic", "nowhere", "--net-in", "8Mbit")),
        (5, ("--disk", "vdz", "--iops", "10")),
        (5, ("--iops-burst", "10")),
        (5, ("--memory", "32MiB")),
    ],
)
def test_what_allocate_does_not_take(site: Site, vm: Guest, status: int, options: tuple[str, ...]) -> None:
    before = virsh("dumpxml", vm.uuid)
    assert "hint: " in site.refused(status, "allocate", vm.name, *options)
    assert virsh("dumpxml", vm.uuid) == before


def test_memory_that_the_guest_uses_is_not_taken(site: Site, vm: Guest) -> None:
    """Best effort takes what is over it, and the guest lives on with the rest; where nothing is over, nothing."""
    site.ok("allocate", vm.name, "--memory", "512MiB")
    full = "mkdir -p /run/full; mount -t tmpfs none /run/full; head -c 90m /dev/zero > /run/full/zeros"
    vm.run(full)
    try:
        await_true(lambda: int(vm.stats("dommemstat")["disk_caches"]) > 90 * KIB, "the guest reports it")
        assert "uses memory" in site.refused(5, "allocate", vm.name, "--memory", "64MiB")
        for _ in range(2):
            taken = site.json("allocate", vm.name, "--memory", "64MiB", "--best-effort")
            kept = taken["result"]["after"]["memory"]
            assert 128 * MIB < kept < 512 * MIB
            assert kept == vm.memory() == promised(vm)["memory"]
            assert site.json("vm", "show", vm.name)["promised"]["memory"] == kept
            assert vm.run("wc -c < /run/full/zeros").strip() == str(90 * MIB)
    finally:
        vm.run("umount /run/full")
        vm.await_report()
        site.ok("allocate", vm.name, "--memory", "256MiB")


def test_a_qdisc_of_somebody_else_is_in_the_way(site: Site, vm: Guest) -> None:
    tap = vm.tap
    subprocess.run(["tc", "qdisc", "replace", "dev", tap, "root", "handle", "77:", "htb"], check=True)
    try:
        said = site.refused(5, "allocate", vm.name, "--net-in", "8Mbit")
        assert tap in said
        assert "htb 77:" in said
        assert "htb 77:" in site.show(vm)["nics"][0]["foreign"]
        assert f"qdisc htb 77: dev {tap} root" in subprocess.check_output(["tc", "qdisc"], text=True)
    finally:
        subprocess.run(["tc", "qdisc", "del", "dev", tap, "root"], check=True)


def test_what_was_not_asked_stays_promised(site: Site, vm: Guest) -> None:
    """Another tool moved the balloon: a change of the CPU's quota promises no other memory than before."""
    virsh("setmem", vm.uuid, "300MiB", "--live")
    site.ok("allocate", vm.name, "--cpu-quota", "90%")
    assert (promised(vm)["memory"], promised(vm)["cpu_quota"]) == (256 * MIB, 90)
    virsh("setmem", vm.uuid, "256MiB", "--live")
    site.ok("allocate", vm.name, "--cpu-quota", "none")
