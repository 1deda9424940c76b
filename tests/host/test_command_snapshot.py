"""snapshot take|list|show|delete and reset: files and RAM as they were, in the same QEMU process."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from host.outside import Guest, alive, await_true, virsh
from host.site import Site

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]

RNG = "<rng model='virtio'><backend model='random'>/dev/urandom</backend><alias name='ua-extra'/></rng>"


def names(site: Site, guest: Guest) -> dict[str, str]:
    """Each snapshot's name, and whether it fits."""
    return {s["name"]: s["status"] for s in site.json("snapshot", "list", guest.name)}


def test_ram_and_disk_go_back_and_the_process_stays(site: Site, vm: Guest) -> None:
    pid = vm.pid
    vm.mark("old")
    vm.run("sleep 4321 > /dev/null 2>&1 & echo $! > /run/sleeper")
    assert site.run("snapshot", "take", vm.name, "s", "--dry-run", "--exit-code").returncode == 10
    assert (names(site, vm), vm.nodes(), vm.tags()) == ({}, [], [])
    site.ok("snapshot", "take", vm.name, "s")
    (node,), (tag,) = vm.nodes(), vm.tags()
    assert vm.state == "running"

    for spoiled in ("new", "newer"):
        vm.mark(spoiled)
        vm.run("rm /etc/profile; kill $(cat /run/sleeper)")
        assert site.run("reset", vm.name, "--to", "s", "--dry-run", "--exit-code").returncode == 10
        assert vm.marks() == (spoiled, spoiled)
        done = site.json("reset", vm.name, "--to", "s")
        assert done["result"]["process"]["pid"] == vm.pid == pid
        assert done["result"]["warmth"] == "warm"
        result = done["result"]
        assert (result["coherence"], result["tracker"], result["uniqueness"]) == ("coherent", "uffd", "reseeded")
        assert 0 < result["paused"] < result["continued_after"]
        assert result["first_life"] > 0
        assert {"restore_ram", "load_state", "await_life"} <= {s["name"] for s in done["steps"]}
        assert done["warnings"] == []
        vm.await_answer()
        assert vm.marks() == ("old", "old")
        assert vm.run("test -e /etc/profile && tr '\\0' ' ' < /proc/$(cat /run/sleeper)/cmdline") == "sleep 4321 "
        assert abs(int(vm.run("date +%s")) - time.time()) < 5
    assert (vm.nodes(), vm.tags()) == ([node], [tag])

    assert site.run("snapshot", "delete", vm.name, "s", "--dry-run", "--exit-code").returncode == 10
    assert vm.tags() == [tag]
    site.ok("snapshot", "delete", vm.name, "s")
    assert (vm.nodes(), vm.tags()) == ([], [])
    vm.run("kill $(cat /run/sleeper)")


def test_a_snapshot_without_a_name_and_what_is_told_of_it(site: Site, vm: Guest) -> None:
    name = site.json("snapshot", "take", vm.name)["result"]["snapshot"]
    site.ok("snapshot", "take", vm.name, "second")
    assert names(site, vm) == {name: "ready", "second": "ready"}
    assert "already" in site.refused(5, "snapshot", "take", vm.name, "second")
    shown = site.json("snapshot", "show", vm.name, "second")
    assert (shown["binding"]["process"]["pid"], shown["vcpus"], shown["balloon"]) == (vm.pid, 1, vm.memory())
    held = sum(f.stat().st_blocks for f in Path(shown["folder"]).iterdir()) * 512
    assert 0 < shown["stored"] <= held
    assert all(f.stat().st_mode & 0o077 == 0 for f in Path(shown["folder"]).iterdir())
    assert f"pid {vm.pid}" in site.ok("snapshot", "show", vm.name, shown["id"])
    for command in (("snapshot", "show"), ("snapshot", "delete")):
        assert "its snapshots" in (said := site.refused(3, *command, vm.name, "none")) or "snapshot list" in said
    assert "no snapshot none" in site.refused(3, "reset", vm.name, "--to", "none")
    site.ok("snapshot", "delete", vm.name, name)
    site.ok("snapshot", "delete", vm.name, shown["id"])


def test_a_vcpu_that_was_plugged_since_is_in_the_way(site: Site, vm: Guest) -> None:
    """The devices are no longer those of the snapshot, also when the guest has the new vCPU offline again."""
    site.ok("snapshot", "take", vm.name, "small")
    site.ok("allocate", vm.name, "--vcpus", "2", "--memory", "320MiB", "--net-in", "8Mbit")
    site.refused(5, "reset", vm.name, "--to", "small")
    vm.await_report()
    site.ok("allocate", vm.name, "--vcpus", "1", "--memory", "256MiB", "--net-in", "none")
    site.ok("snapshot", "delete", vm.name, "small")


def test_a_vm_that_its_operator_paused_stays_paused(site: Site, vm: Guest) -> None:
    vm.mark("paused")
    site.ok("snapshot", "take", vm.name, "s")
    vm.mark("spoiled")
    virsh("suspend", vm.uuid)
    done = site.json("reset", vm.name, "--to", "s")
    assert "stays paused" in " ".join(done["reasons"])
    assert (vm.state, done["result"]["uniqueness"], "paused" in done["result"]) == ("paused", "not guaranteed", False)
    virsh("resume", vm.uuid)
    vm.await_answer()
    assert vm.marks() == ("paused", "paused")
    site.ok("snapshot", "delete", vm.name, "s")


def test_a_device_that_was_plugged_since_is_in_the_way(site: Site, vm: Guest, tmp_path: Path) -> None:
    device = tmp_path / "rng.xml"
    device.write_text(RNG)
    devices = len(vm.xml().findall("devices/rng"))
    site.ok("snapshot", "take", vm.name, "s")
    vm.mark("mine")
    virsh("attach-device", vm.uuid, str(device), "--live")
    try:
        said = site.refused(5, "reset", vm.name, "--to", "s")
        assert "is new" in said
        assert "virtio-rng" in said
        assert "is new" in names(site, vm)["s"]
        assert (vm.marks(), vm.state) == (("mine", "mine"), "running")
    finally:
        virsh("detach-device-alias", vm.uuid, "ua-extra", "--live")
        await_true(lambda: len(vm.xml().findall("devices/rng")) == devices, "the device is gone")
    assert names(site, vm)["s"] == "ready"
    site.ok("snapshot", "delete", vm.name, "s")


def test_another_qemu_process_is_in_the_way_and_stop_drops_all(site: Site) -> None:
    with site.created("--start") as guest:
        site.ok("snapshot", "take", guest.name, "s")
        folder = Path(site.json("snapshot", "show", guest.name, "s")["folder"])
        old = guest.pid
        virsh("destroy", guest.uuid)
        assert "QEMU process" in names(site, guest)["s"]
        assert len(guest.stored_tags()) == 1
        virsh("start", guest.uuid)
        guest.await_boot()
        guest.mark("mine")
        assert not alive(old)
        assert "QEMU process" in site.refused(5, "reset", guest.name, "--to", "s")
        assert guest.marks() == ("mine", "mine")

        site.ok("snapshot", "take", guest.name, "fits")
        done = json.loads(site.ok("-f", "json", "vm", "stop", guest.name))["operation"]
        assert [s["name"] for s in done["steps"]] == ["shutdown", "clear_nics", "drop_snapshot", "drop_snapshot"]
        assert (guest.stored_tags(), folder.exists(), names(site, guest)) == ([], False, {})
        assert "a snapshot is of a running VM" in site.refused(5, "snapshot", "take", guest.name, "s")
