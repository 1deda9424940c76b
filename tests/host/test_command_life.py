"""vm create|list|show|start|stop|delete|protect, and the flags that every command has, as a child process."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import yaml

from host.foreign import foreign
from host.outside import MIB, Guest, virsh
from host.site import Site

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]


def test_create_with_every_option_then_delete(site: Site) -> None:
    name = site.name()
    command = (
        *("vm", "create", name, "--image", "micro", "--vcpus", "2", "--max-vcpus", "3"),
        *("--memory", "192MiB", "--max-memory", "320MiB", "--disk", "data:64MiB", "--disk", "logs:32MiB"),
        *("--nic", site.bridge, "--nic", site.bridge, "--label", "owner=ci", "--label", "tier=1", "--start"),
    )
    planned = site.run(*command, "--dry-run", "--exit-code")
    assert (planned.returncode, name in virsh("list", "--all")) == (10, False), planned.stderr
    assert "make_disks" in planned.stdout

    site.ok(*command)
    guest = site.guest(name)
    guest.await_boot()
    assert (guest.vcpus("--live", "--active"), guest.vcpus("--maximum", "--live"), guest.online()) == (2, 3, 2)
    assert guest.memory() == 192 * MIB
    assert 128 * MIB < guest.mem_total() < 192 * MIB
    assert int(guest.xml().findtext("memory", "0")) == 320 * 1024
    assert guest.run("cat /sys/block/vd?/size").split() == [str(size * 2048) for size in (64, 32)]
    assert guest.run("grep -h . /sys/block/vd?/serial").split() == ["data", "logs"]
    assert guest.run("ls -d /sys/class/net/*/device | wc -l").strip() == "2"
    shown = site.show(guest)
    assert shown["labels"] == {"owner": "ci", "tier": "1"}
    assert shown["accel"] == ("kvm" if guest.xml().get("type") == "kvm" else "tcg")
    assert site.refused(5, "vm", "delete", name).startswith(f"hvctl: {name} is running")

    planned = site.run("vm", "delete", name, "--force", "--dry-run", "--exit-code")
    assert (planned.returncode, guest.state) == (10, "running")
    folder = guest.overlays()[0].parent
    site.ok("vm", "delete", name, "--force")
    assert (name in virsh("list", "--all"), folder.exists()) == (False, False)
    assert site.refused(3, "vm", "show", name)


def test_a_vm_without_disk_and_nic_stays_off_until_it_is_started(site: Site) -> None:
    name = site.name()
    site.ok("vm", "create", name, "--image", "micro", "--disk", "none", "--nic", "none")
    guest = site.guest(name)
    assert guest.state == "shut off"
    assert (guest.xml().find("devices/disk"), guest.xml().find("devices/interface")) == (None, None)
    site.ok("vm", "delete", name, "--dry-run")
    assert guest.state == "shut off"
    site.ok("vm", "delete", name)


@pytest.mark.parametrize(
    ("status", "options"),
    [
        (2, ("Web", "--image", "micro")),
        (2, ("../web", "--image", "micro")),
        (2, ("web", "--image", "micro", "--memory", "256")),
        (2, ("web", "--image", "micro", "--memory", "2GiB", "--max-memory", "1GiB")),
        (2, ("web", "--image", "micro", "--vcpus", "3", "--max-vcpus", "2")),
        (2, ("web", "--image", "micro", "--disk", "data")),
        (2, ("web", "--image", "micro", "--label", "alone")),
        (3, ("web", "--image", "nowhere")),
        (5, ("web", "--image", "micro", "--memory", "32MiB")),
    ],
)
def test_what_create_does_not_take(site: Site, status: int, options: tuple[str, ...]) -> None:
    said = site.refused(status, "vm", "create", *options)
    assert said.startswith("hvctl: ")
    assert "hint: " in said


def test_a_name_is_given_once(site: Site, vm: Guest) -> None:
    assert f"there is a VM {vm.name} already" in site.refused(5, "vm", "create", vm.name, "--image", "micro")


def test_list_and_show_tell_what_virsh_and_proc_tell(site: Site, vm: Guest) -> None:
    (row,) = (r for r in site.json("vm", "list") if r["name"] == vm.name)
    assert (row["uuid"], row["state"], row["memory"], row["managed"]) == (vm.uuid, "running", vm.memory(), True)
    (line,) = (r for r in csv.DictReader(io.StringIO(site.ok("-f", "csv", "vm", "list"))) if r["name"] == vm.name)
    assert (line["vcpus"], line["image"], line["warm"]) == ("1", "micro", "True")
    assert any(text.split()[:2] == [vm.name, "running"] for text in site.ok("vm", "list").splitlines())

    shown = site.show(vm)
    stat = Path(f"/proc/{vm.pid}/stat").read_text().rpartition(")")[2].split()
    assert (shown["process"]["pid"], shown["process"]["start_time"]) == (vm.pid, int(stat[19]))
    assert shown["console"] == virsh("ttyconsole", vm.uuid).strip()
    assert [n["tap"] for n in shown["nics"]] == [vm.tap]
    assert yaml.safe_load(site.ok("-f", "yaml", "vm", "show", vm.uuid))["vm"] == shown
    assert f"pid {vm.pid}" in site.ok("vm", "show", vm.name)


def test_flags_of_every_command(site: Site, vm: Guest) -> None:
    assert json.loads(site.ok("-c", "qemu:///system", "-f", "json", "vm", "list"))["schema_version"] == 1
    assert "local" in site.refused(5, "-c", "test:///default", "vm", "list")
    assert "Traceback" in site.run("--debug", "vm", "show", "nobody").stderr
    assert site.ok("--version").startswith("hvctl ")
    settings = {s["name"]: s for s in site.json("config", "show")}
    assert (settings["state_dir"]["value"], settings["state_dir"]["from"]) == (
        site.settings.state_dir,
        "HVCTL_STATE_DIR",
    )
    loud = site.run("-v", "allocate", vm.name, "--cpu-weight", "150")
    assert "set cpu weight 150" in loud.stderr
    assert site.run("allocate", vm.name, "--cpu-weight", "none").stderr == ""


def test_a_repeated_request_with_its_key_is_done_once(site: Site, vm: Guest) -> None:
    first = site.json("--key", "weight-1", "allocate", vm.name, "--cpu-weight", "150")
    site.ok("allocate", vm.name, "--cpu-weight", "none")
    again = site.json("--key", "weight-1", "allocate", vm.name, "--cpu-weight", "150")
    assert (again["operation"], vm.cpu()) == (first["operation"], (100, None))
    assert "this key" in site.refused(5, "--key", "weight-1", "vm", "protect", vm.name)


def test_images_are_listed_and_kept_while_they_are_in_use(site: Site, vm: Guest) -> None:
    (image,) = site.json("image", "list")
    assert image["name"] == "micro"
    assert site.json("image", "build", "micro", "--dry-run") == [image]
    assert f"the VM {vm.name} boots from" in site.refused(5, "image", "delete", "micro")
    assert Path(image["kernel"]).exists()


def test_a_protected_vm_is_not_stopped_reset_or_deleted(site: Site, vm: Guest) -> None:
    assert site.run("vm", "protect", vm.name, "--dry-run", "--exit-code").returncode == 10
    assert not site.show(vm)["protected"]
    site.ok("vm", "protect", vm.name)
    assert '"protected": true' in virsh("dumpxml", vm.uuid, "--inactive")
    site.ok("snapshot", "take", vm.name, "s")
    for command in (
        ("vm", "stop", vm.name, "--force"),
        ("vm", "delete", vm.name, "--force"),
        ("reset", vm.name, "--to", "s"),
    ):
        assert "protected" in site.refused(5, *command)
    assert vm.state == "running"
    site.ok("snapshot", "delete", vm.name, "s")
    site.ok("vm", "protect", vm.name, "--off")
    assert '"protected": true' not in virsh("dumpxml", vm.uuid, "--inactive")
    assert "nothing to do" in site.ok("vm", "protect", vm.name, "--off")


def test_a_guest_that_does_not_power_off_runs_on(site: Site) -> None:
    with foreign(site, boots=False) as guest:
        virsh("start", guest.uuid)
        assert "did not power off in 1 s" in site.refused(8, "vm", "stop", guest.name, "--seconds", "1")
        assert guest.state == "running"


def test_stop_asks_the_guest_and_force_does_not(site: Site, vm: Guest) -> None:
    assert site.run("vm", "stop", vm.name, "--dry-run", "--exit-code").returncode == 10
    site.ok("vm", "stop", vm.name, "--force")
    assert vm.state == "shut off"
    assert site.run("vm", "start", vm.name, "--dry-run", "--exit-code").returncode == 10
    site.ok("vm", "start", vm.name)
    vm.await_boot()
    assert "runs already" in site.ok("vm", "start", vm.name)
    vm.mark("kept")
    site.ok("vm", "stop", vm.name)
    assert (vm.state, virsh("domstate", "--reason", vm.uuid).strip()) == ("shut off", "shut off (shutdown)")
    site.ok("vm", "start", vm.name)
    vm.await_boot()
    assert vm.run("cat /data/mark") == "kept\n"
