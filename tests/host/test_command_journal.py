"""operation list|show, recover, two commands on one VM, and the admission to a host that is small."""

from __future__ import annotations

import signal

import pytest

from host.outside import Guest, await_true, ifbs
from host.site import Site, await_stopped, ended

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]

NO_RESERVE = {"HVCTL_RESERVE_MEMORY": "0B"}
SMALL = {**NO_RESERVE, "HVCTL_MEMORY_OVERCOMMIT": "0.00001", "HVCTL_CPU_OVERCOMMIT": "0.001"}


def test_the_journal_tells_what_was_done(site: Site, vm: Guest) -> None:
    number = site.json("allocate", vm.name, "--cpu-quota", "70%")["operation"]
    site.refused(5, "allocate", vm.name, "--vcpus", "9")
    newest, *older = site.json("operation", "list", "--vm", vm.name, "--state", "done", "--limit", "2")
    assert (newest["id"], newest["kind"], newest["vm_uuid"], len(older)) == (number, "allocate", vm.uuid, 1)
    shown = site.json("operation", "show", str(number))
    assert [s["name"] for s in shown["steps"]] == ["set_cpu_quota", "set_record"]
    assert all(s["seconds"] > 0 and s["outcome"] == "done" for s in shown["steps"])
    assert shown["opened_at"] <= shown["closed_at"]
    assert "set_cpu_quota 70%" in site.ok("operation", "show", str(number))
    assert site.json("operation", "list", "--vm", vm.uuid, "--state", "failed") == []
    assert "9999" in site.refused(3, "operation", "show", "9999")
    site.ok("allocate", vm.name, "--cpu-quota", "none")


def test_recover_ends_what_a_dead_owner_left(site: Site, vm: Guest) -> None:
    assert site.json("recover") == []
    done = site.run("allocate", vm.name, "--cpu-quota", "50%", fault="allocate:set_cpu_quota:after=kill")
    assert (done.returncode, vm.cpu()) == (-signal.SIGKILL, (100, 50))
    (opened,) = site.json("operation", "list", "--state", "open")
    (recovered,) = site.json("recover")
    assert (recovered["id"], recovered["state"], vm.cpu()) == (opened["id"], "undone", (100, None))
    assert recovered["reason"].startswith("recovered: ")


def test_a_failed_step_is_undone_and_said(site: Site, vm: Guest) -> None:
    failing = site.run(
        "allocate", vm.name, "--cpu-quota", "50%", "--iops", "9", fault="allocate:set_disk_limit:before=raise"
    )
    assert (failing.returncode, vm.cpu()) == (8, (100, None))
    assert "Everything is as it was" in failing.stderr


def test_a_vm_that_is_busy_is_not_touched(site: Site, vm: Guest) -> None:
    owner = site.spawn("allocate", vm.name, "--cpu-quota", "50%", fault="allocate:set_cpu_quota:before=hang")
    (opened,) = await_row(site)
    said = site.refused(7, "allocate", vm.name, "--cpu-weight", "50", env={"HVCTL_LOCK_WAIT": "0.5"})
    assert f"operation {opened} (pid {owner.pid})" in said
    assert "still open" in site.refused(9, "recover")
    assert vm.cpu() == (100, None)
    site.kill(owner)
    # The next command on the VM ends what the dead one left, and goes on.
    site.ok("allocate", vm.name, "--cpu-weight", "50")
    assert vm.cpu() == (50, None)
    assert site.json("operation", "show", str(opened))["state"] == "undone"
    site.ok("allocate", vm.name, "--cpu-weight", "none")


def await_row(site: Site) -> list[int]:
    await_true(lambda: bool(site.open_rows()), "an operation is open")
    return site.open_rows()


def test_the_second_command_waits_for_the_first(site: Site, vm: Guest) -> None:
    first = site.spawn("allocate", vm.name, "--cpu-quota", "50%", fault="allocate:set_cpu_quota:before=stop")
    await_stopped(first)
    second = site.spawn("allocate", vm.name, "--cpu-quota", "60%", env={"HVCTL_LOCK_WAIT": "60"})
    first.send_signal(signal.SIGCONT)
    assert [ended(p)[0] for p in (first, second)] == [0, 0]
    assert vm.cpu() == (100, 60)
    site.ok("allocate", vm.name, "--cpu-quota", "none")


@pytest.mark.parametrize(
    ("options", "capacity", "said"),
    [
        (("--memory", "512MiB"), SMALL, "memory lacks"),
        (("--vcpus", "2"), SMALL, "cpu lacks"),
        (("--net-in", "20Mbit"), {"HVCTL_NETWORK_CAPACITY": "8Mbit"}, "network lacks 12 Mbit/s"),
        (("--iops", "500"), {"HVCTL_IOPS_CAPACITY": "200"}, "iops lacks 300 IOPS"),
    ],
)
def test_what_does_not_fit_is_refused(
    site: Site, vm: Guest, options: tuple[str, ...], capacity: dict[str, str], said: str
) -> None:
    rows = site.journal("select max(id) from operation")
    for dry in ((), ("--dry-run",)):
        asked = ("allocate", vm.name, *options, *dry)
        # VMs of tests that run beside this one hold some, too, for a while.
        await_true(lambda asked=asked: said in site.refused(5, *asked, env=capacity), said)
    assert site.journal("select max(id) from operation") == rows
    site.ok("allocate", vm.name, "--cpu-quota", "50%", env=capacity)  # what shrinks is never refused
    site.ok("allocate", vm.name, "--cpu-quota", "none")


def test_a_refusal_names_the_lack_and_the_holder(site: Site, vm: Guest) -> None:
    site.ok("allocate", vm.name, "--memory", "1GiB")
    name = site.name()
    said = site.refused(5, "vm", "create", name, "--image", "micro", "--start", env=SMALL)
    assert "(256 MiB asked" in said
    assert f"{vm.name} 1 GiB" in said
    site.ok("vm", "create", name, "--image", "micro", "--nic", site.bridge, env=SMALL)  # one that is off holds nothing
    site.ok("allocate", name, "--net-in", "8Mbit", env=SMALL)
    assert "memory lacks" in site.refused(5, "vm", "start", name, env=SMALL)
    guest = site.guest(name)
    assert (guest.state, ifbs(guest.uuid)) == ("shut off", [])
    site.ok("vm", "delete", name)
    vm.await_report()
    site.ok("allocate", vm.name, "--memory", "256MiB")
