"""What virsh shows and does on a VM that hvctl has reset: its disks, snapshots, block jobs, saved states; and that what
VMs share stays root's through all of it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from host.outside import MIB, Guest, alive, await_true, virsh
from host.site import Site, copy_image
from hvctl.adapters.guest.pulse import ends
from hvctl.adapters.images import imagestore
from hvctl.adapters.kernel.process import qemu_owner

pytestmark = pytest.mark.host

PLACES = ("/srv/mark", "/data/mark")
RAM_PLACE = "/run/mark"


@pytest.fixture(scope="module")
def vm(site: Site) -> Iterator[Guest]:
    """A guest with a root disk over an image that VMs share, and a data disk of its own."""
    copy_image(site.settings, "debian")
    name = site.name()
    site.ok("vm", "create", name, "--image", "debian", "--disk", "data:64MiB", "--nic", "none", "--start")
    guest = site.guest(name)
    guest.await_boot()
    yield guest
    site.ok("vm", "delete", name, "--force")


@pytest.fixture(autouse=True)
def back(site: Site, vm: Guest) -> Iterator[None]:
    """A VM that was just reset to snapshot `s`, with `old` everywhere; and what VMs share is as it was, always."""
    before = shared(site)
    put(vm, "old")
    site.ok("snapshot", "take", vm.name, "s")
    put(vm, "new")
    site.ok("reset", vm.name, "--to", "s")
    assert held(vm) == ["old", "old", "old"]
    assert shared(site) == before
    yield
    assert shared(site) == before
    assert {(uid, gid) for uid, gid, _ in before.values()} == {(0, 0)}
    assert all(mode & 0o222 == 0 for _, _, mode in before.values())
    site.ok("snapshot", "delete", vm.name, "s")


def shared(site: Site) -> dict[str, tuple[int, int, int]]:
    """Owner and mode of every file that VMs boot from."""
    files = (f for f in site.settings.images_dir.rglob("*") if f.is_file() and f.name != ".lock")
    return {str(f): (f.stat().st_uid, f.stat().st_gid, f.stat().st_mode) for f in files}


def put(vm: Guest, text: str) -> None:
    vm.await_answer()  # after a reset libvirt takes the agent's channel for closed for a moment
    vm.run(f"for f in {RAM_PLACE} {' '.join(PLACES)}; do echo {text} > $f; done; sync")


def held(vm: Guest) -> list[str]:
    """What RAM and the disks hold; the disks are read, not the guest's cache of them."""
    vm.await_answer()
    return vm.run(f"sync; echo 3 > /proc/sys/vm/drop_caches; cat {RAM_PLACE} {' '.join(PLACES)}").split()


def boots(vm: Guest) -> str:
    return vm.run("cat /proc/sys/kernel/random/boot_id").strip()


def sources(vm: Guest, *, inactive: bool = False) -> list[str]:
    return [s.get("file", "") for s in vm.xml(inactive=inactive).findall("devices/disk/source")]


def active(vm: Guest) -> list[str]:
    """The files that QEMU writes into, in the order of the disks."""
    return [d["inserted"]["file"] for d in vm.qmp("query-block") if d.get("inserted")]


def owner(path: str | Path) -> tuple[int, int]:
    return Path(path).stat().st_uid, Path(path).stat().st_gid


def status(site: Site, vm: Guest) -> Any:
    (only,) = site.json("snapshot", "list", vm.name)
    return only["status"]


def refused_for_its_disks(site: Site, vm: Guest, name: str) -> None:
    said = site.refused(5, "reset", vm.name, "--to", name)
    assert "does not fit" in said
    assert "disk" in said


def denied(*argv: str) -> str:
    done = subprocess.run(["virsh", *argv], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0, done.stdout
    return done.stderr


def commit_back(vm: Guest) -> None:
    for target in ("vda", "vdb"):
        virsh("blockcommit", vm.uuid, target, "--shallow", "--active", "--pivot", "--wait")


def overlaid(vm: Guest, name: str) -> list[Path]:
    """Overlays that virsh makes beside the disks; whoever asks for them removes them."""
    virsh("snapshot-create-as", vm.uuid, name, "--disk-only", "--no-metadata")
    return [Path(path) for path in sources(vm)]


def test_the_disks_are_shown_as_they_are(vm: Guest) -> None:
    assert sources(vm) == sources(vm, inactive=True) == active(vm)
    for target, path in zip(("vda", "vdb"), sources(vm), strict=True):
        shown = vm.stats("domblkinfo", target)
        image = json.loads(subprocess.check_output(["qemu-img", "info", "-U", "--output", "json", path]))
        assert int(shown["Capacity"]) == image["virtual-size"]
        assert int(shown["Physical"]) == Path(path).stat().st_size
        # The end of what the guest wrote, which QEMU may have put on the disk since.
        assert 0 < int(shown["Allocation"]) <= int(shown["Physical"]) + MIB

        line = virsh("domblkstat", vm.uuid, target)
        before = {words[1]: int(words[2]) for words in map(str.split, line.splitlines()) if len(words) == 3}
        place = {"vda": "/srv", "vdb": "/data"}[target]
        vm.run(f"dd if=/dev/urandom of={place}/blob bs=1M count=4 conv=fsync 2>/dev/null; rm {place}/blob")
        line = virsh("domblkstat", vm.uuid, target)
        after = {words[1]: int(words[2]) for words in map(str.split, line.splitlines()) if len(words) == 3}
        assert 4 * MIB <= after["wr_bytes"] - before["wr_bytes"] < 16 * MIB
        assert after["wr_req"] > before["wr_req"]


def test_the_definition_is_that_of_the_process(site: Site, vm: Guest) -> None:
    command = Path(f"/proc/{vm.pid}/cmdline").read_bytes().decode().split("\0")
    image = imagestore.find(site.settings, "debian")
    values = [argument.get("value") for argument in vm.xml().iter() if argument.tag.endswith("}arg")]
    for option, value in (("-kernel", image.kernel), ("-initrd", image.initrd), ("-append", image.cmdline)):
        assert command[command.index(option) + 1] == values[values.index(option) + 1] == value
    assert vm.run("cat /proc/cmdline").strip() == image.cmdline
    assert image.root is not None
    (base,) = vm.xml().findall(f"devices/disk//source[@file='{image.root}']")
    assert [(label.get("model"), label.get("relabel")) for label in base] == [("dac", "no")]
    channels = {t.get("name"): t.get("state") for t in vm.xml().findall("devices/channel/target")}
    assert set(channels) == {"org.qemu.guest_agent.0", "org.hvctl.pulse.0"}
    await_true(lambda: {t.get("state") for t in vm.xml().findall("devices/channel/target")} == {"connected"}, "both")


def test_an_external_snapshot_is_made_and_committed_back(site: Site, vm: Guest) -> None:
    """In between the disks are others: the older snapshot is refused. Once they are the same again, it fits again."""
    disks = sources(vm)
    made = overlaid(vm, "over")
    try:
        assert [str(p) for p in made] == sources(vm, inactive=True) == active(vm)
        assert {owner(p) for p in (*made, *disks)} == {qemu_owner()}
        put(vm, "over")
        assert held(vm) == ["over", "over", "over"]

        refused_for_its_disks(site, vm, "s")
        assert "disk" in status(site, vm)
        assert (vm.state, held(vm)) == ("running", ["over", "over", "over"])

        # Without --shallow it would write into the image that all VMs boot from.
        assert "Permission denied" in denied("blockcommit", vm.uuid, "vda", "--active", "--pivot", "--wait")
        assert (sources(vm)[0], vm.state) == (str(made[0]), "running")

        commit_back(vm)
        assert disks == sources(vm) == sources(vm, inactive=True) == active(vm)
        assert held(vm) == ["over", "over", "over"]
        assert status(site, vm) == "ready"
        site.ok("reset", vm.name, "--to", "s")
        assert held(vm) == ["old", "old", "old"]
        assert {owner(p) for p in disks} == {qemu_owner()}
    finally:
        remove(vm, made)


def remove(vm: Guest, made: list[Path]) -> None:
    """virsh leaves the files of overlays that were committed; never those that a disk still needs."""
    for path in made:
        if str(path) not in sources(vm):
            path.unlink()


def test_a_snapshot_of_an_overlay_of_virsh_ends_with_it(site: Site, vm: Guest) -> None:
    """Taken with the overlay in place, it works there, and is refused when its disks are gone."""
    made = overlaid(vm, "over")
    try:
        put(vm, "there")
        site.ok("snapshot", "take", vm.name, "there")
        put(vm, "spoiled")
        site.ok("reset", vm.name, "--to", "there")
        assert held(vm) == ["there", "there", "there"]
        commit_back(vm)
        assert held(vm) == ["there", "there", "there"]
        refused_for_its_disks(site, vm, "there")
    finally:
        remove(vm, made)
        site.ok("snapshot", "delete", vm.name, "there")


def test_a_vm_starts_on_an_overlay_of_virsh(site: Site, vm: Guest) -> None:
    disks = sources(vm)
    made = overlaid(vm, "over")
    try:
        put(vm, "over")
        virsh("shutdown", vm.uuid, "--mode", "agent")
        await_true(lambda: vm.state == "shut off", "the guest powers off")
        virsh("start", vm.uuid)
        vm.await_boot()
        assert (sources(vm), {owner(p) for p in (*made, *disks)}) == ([str(p) for p in made], {qemu_owner()})
        assert vm.run(f"cat {' '.join(PLACES)}").split() == ["over", "over"]
        commit_back(vm)
        assert vm.run(f"echo 3 > /proc/sys/vm/drop_caches; cat {' '.join(PLACES)}").split() == ["over", "over"]
    finally:
        remove(vm, made)


@pytest.mark.parametrize("managed", [False, True], ids=["save and restore", "managedsave and start"])
def test_a_saved_state_comes_back(site: Site, vm: Guest, managed: bool, tmp_path: Path) -> None:
    """With its RAM, whatever hvctl left out of its own states; in another process, which no older snapshot fits."""
    old = vm.pid
    put(vm, "kept")
    vm.run("sleep 4321 > /dev/null 2>&1 & echo $! > /run/sleeper")
    life = boots(vm)
    if managed:
        virsh("managedsave", vm.uuid)
        assert not alive(old)
        virsh("start", vm.uuid)
    else:
        file = tmp_path / "saved"
        virsh("save", vm.uuid, str(file))
        assert not alive(old)
        assert file.stat().st_size > 32 * MIB
        virsh("restore", str(file))
    vm.await_answer()
    assert (boots(vm), held(vm)) == (life, ["kept", "kept", "kept"])
    assert vm.run("tr '\\0' ' ' < /proc/$(cat /run/sleeper)/cmdline; kill $(cat /run/sleeper)") == "sleep 4321 "
    assert {owner(p) for p in sources(vm)} == {qemu_owner()}
    assert "QEMU process" in site.refused(5, "reset", vm.name, "--to", "s")

    site.ok("snapshot", "take", vm.name, "after")
    put(vm, "spoiled")
    site.ok("reset", vm.name, "--to", "after")
    assert held(vm) == ["kept", "kept", "kept"]
    site.ok("snapshot", "delete", vm.name, "after")


def test_a_reboot_boots_the_same_kernel_again(vm: Guest) -> None:
    life, kernel, process = boots(vm), vm.run("cat /proc/version /proc/cmdline"), vm.pid
    virsh("reboot", vm.uuid, "--mode", "agent")

    def rebooted() -> bool:
        with suppress(AssertionError):
            return boots(vm) != life
        return False

    await_true(rebooted, "the guest has booted again")
    assert (vm.pid, vm.run("cat /proc/version /proc/cmdline")) == (process, kernel)
    assert vm.run(f"cat {' '.join(PLACES)}").split() == ["old", "old"]


def test_a_stopped_vm_starts_again_whoever_owns_its_files_by_then(site: Site, vm: Guest) -> None:
    """libvirt gives files back when a VM ends: to whom depends on what the file system can remember."""
    disks = sources(vm)
    folder = Path(disks[0]).parent
    for how in ("destroy", "stop"):
        if how == "destroy":
            virsh("destroy", vm.uuid)
        else:
            site.ok("vm", "stop", vm.name)
        for path in (*disks, *ends(str(folder / "pulse"))):
            with suppress(OSError):
                subprocess.run(["chown", "0:0", path], check=True)
        virsh("start", vm.uuid)
        vm.await_boot()
        assert {owner(p) for p in (*disks, *ends(str(folder / "pulse")))} == {qemu_owner()}
        assert vm.run(f"cat {' '.join(PLACES)}").split() == ["old", "old"]
    # `stop` dropped the snapshot, the end of the test deletes one.
    site.ok("snapshot", "take", vm.name, "s")
