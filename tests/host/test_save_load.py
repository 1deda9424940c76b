"""snapshot save, load and diff on real VMs: a guest that ran goes on in a new QEMU process, when its process and all
of the host's memory are gone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from host.outside import MIB, Guest, alive, await_true, virsh
from host.site import Site, await_stopped, ended
from hvctl import codec
from hvctl.model.archive import Archive

pytestmark = pytest.mark.host

NOBODY = "00000000-0000-0000-0000-000000000000"
RNG = "<rng model='virtio'><backend model='random'>/dev/urandom</backend><alias name='ua-extra'/></rng>"


@dataclass(frozen=True)
class Kept:
    """A VM that is off, and a snapshot of it on a disk; disks are the sums of its overlays."""

    guest: Guest
    folder: Path
    disks: dict[str, str]


def sums(guest: Guest) -> dict[str, str]:
    """Of its overlays, byte by byte."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in guest.overlays()}


def restart_host(site: Site, guest: Guest) -> None:
    """As far as a VM sees it: the process is gone, and everything that was on a tmpfs."""
    if guest.state != "shut off":
        virsh("destroy", guest.uuid)
    shutil.rmtree(site.settings.snapshots_dir, ignore_errors=True)
    shutil.rmtree(site.settings.locks_dir, ignore_errors=True)


def snapshots(site: Site, guest: Guest) -> dict[str, str]:
    return {s["name"]: s["status"] for s in site.json("snapshot", "list", guest.name)}


def sleeper(guest: Guest) -> str:
    """A program that was started before the snapshot: it lives in RAM alone."""
    return guest.run("tr '\\0' ' ' < /proc/$(cat /run/sleeper)/cmdline").strip()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on a disk, root's alone."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture(scope="module")
def made(site: Site, shelf: Path) -> Iterator[Guest]:
    """A guest that did something, was saved, and went on."""
    with site.created(
        "--start", "--vcpus", "1", "--memory", "320MiB", "--disk", "data:64MiB", "--disk", "logs:32MiB"
    ) as guest:
        guest.mark("then")
        guest.run("sleep 4321 > /dev/null 2>&1 & echo $! > /run/sleeper")
        guest.run("head -c 8000000 /dev/urandom > /run/ballast; sha256sum < /run/ballast > /run/sum")
        site.ok("snapshot", "take", guest.name, "s")
        site.ok("snapshot", "save", guest.name, "s", "--to", str(shelf / "s"))
        guest.mark("since")
        guest.run("rm /run/ballast; kill $(cat /run/sleeper)")
        yield guest


@pytest.fixture
def kept(site: Site, made: Guest, shelf: Path) -> Kept:
    """That guest, off, after its host."""
    restart_host(site, made)
    return Kept(made, shelf / "s", sums(made))


def assert_as_then(guest: Guest) -> None:
    guest.await_answer()
    assert guest.marks() == ("then", "then")
    assert sleeper(guest) == "sleep 4321"
    assert guest.run("sha256sum < /run/ballast | cmp - /run/sum && echo same").strip() == "same"
    assert abs(int(guest.run("date +%s")) - time.time()) < 5
    assert "EXT4-fs error" not in guest.run("dmesg")


def assert_off_as_before(site: Site, kept: Kept) -> None:
    assert kept.guest.state == "shut off"
    assert sums(kept.guest) == kept.disks
    assert snapshots(site, kept.guest) == {}
    assert site.open_rows() == []
    assert not [p for p in kept.guest.overlays()[0].parent.iterdir() if p.suffix in (".old", ".new", ".json")]


@pytest.mark.usefixtures("nothing_left")
def test_the_guest_runs_on_while_it_is_saved(site: Site, vm: Guest, shelf: Path) -> None:
    site.ok("snapshot", "take", vm.name, "s")
    pid = vm.pid
    try:
        vm.mark("before")
        assert (
            site.run("snapshot", "save", vm.name, "s", "--to", str(shelf / "vm"), "--dry-run", "--exit-code").returncode
            == 10
        )
        assert not (shelf / "vm").exists()
        saving = site.spawn(
            "snapshot", "save", vm.name, "s", "--to", str(shelf / "vm"), fault="snapshot-save:write_archive:after=stop"
        )
        await_stopped(saving)
        assert (vm.state, vm.pid) == ("running", pid)
        vm.mark("while")
        saving.send_signal(signal.SIGCONT)
        status, said = ended(saving)
        assert status == 0, said
        assert vm.marks() == ("while", "while")
        files = {p.name: p for p in (shelf / "vm").iterdir()}
        assert set(files) == {"manifest.json", "ram.zst", "state.qcow2", "disk-vda.qcow2"}
        assert {p.stat().st_mode & 0o777 for p in files.values()} == {0o600}
        assert (shelf / "vm").stat().st_mode & 0o777 == 0o700
        archive = codec.load_json(Archive, json.loads(files["manifest.json"].read_text())["archive"])
        ram = archive.pages * 4096
        assert 0 < files["ram.zst"].stat().st_size < ram < archive.snapshot.ram_size
        assert archive.hardware.machine.startswith("pc-i440fx-")
        assert archive.hardware.features
        assert "there already" in site.refused(5, "snapshot", "save", vm.name, "s", "--to", str(shelf / "vm"))
        assert "no snapshot none" in site.refused(3, "snapshot", "save", vm.name, "none", "--to", str(shelf / "x"))
        assert "running" in site.refused(5, "snapshot", "load", vm.name, str(shelf / "vm"))
    finally:
        site.ok("snapshot", "delete", vm.name, "s")


def test_a_guest_goes_on_after_its_host(site: Site, kept: Kept) -> None:
    guest = kept.guest
    done = site.json("snapshot", "load", guest.name, str(kept.folder))
    assert done["result"]["warmth"] == "cold"
    assert done["result"]["process"]["pid"] == guest.pid
    assert (done["result"]["missed"], done["warnings"]) == (0, [])
    assert_as_then(guest)
    assert guest.memory() == 320 * MIB
    assert snapshots(site, guest) == {"s": "ready"}
    assert done["result"]["uniqueness"] == "reseeded"

    pid = guest.pid
    guest.mark("later")
    guest.run("rm /run/ballast")
    assert site.json("reset", guest.name, "--to", "s")["result"]["warmth"] == "warm"
    assert guest.pid == pid
    assert_as_then(guest)

    # libvirt's picture is that of any VM.
    assert guest.stats("domblkinfo", "vda")["Capacity"]
    assert len(guest.xml().findall("devices/disk")) == 2
    site.ok("snapshot", "delete", guest.name, "s")
    assert (guest.nodes(), guest.tags()) == ([], [])


def test_it_is_loaded_under_another_name_and_saved_again(site: Site, kept: Kept, shelf: Path) -> None:
    """What was loaded is a snapshot as any other one: the next one builds on it, and can be saved flat."""
    guest = kept.guest
    site.ok("snapshot", "load", guest.name, str(kept.folder), "--name", "again")
    guest.await_answer()
    guest.run("head -c 3000000 /dev/urandom > /run/more; sha256sum < /run/more > /run/moresum")
    site.ok("snapshot", "take", guest.name, "child")
    assert site.json("snapshot", "show", guest.name, "child")["parent"]
    site.ok("snapshot", "save", guest.name, "child", "--to", str(shelf / "child"))
    restart_host(site, guest)
    site.ok("snapshot", "load", guest.name, str(shelf / "child"))
    assert_as_then(guest)
    assert guest.run("sha256sum < /run/more | cmp - /run/moresum && echo same").strip() == "same"
    assert snapshots(site, guest) == {"child": "ready"}
    restart_host(site, guest)
    site.ok("snapshot", "load", guest.name, str(kept.folder))
    assert_as_then(guest)
    assert "more" not in guest.run("ls /run")
    shutil.rmtree(shelf / "child")


def test_a_dry_run_changes_nothing(site: Site, kept: Kept) -> None:
    assert site.run("snapshot", "load", kept.guest.name, str(kept.folder), "--dry-run", "--exit-code").returncode == 10
    assert_off_as_before(site, kept)


def _flipped(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-100, os.SEEK_END)
            file.write(bytes([byte ^ 1]))

    return spoil


def _swapped(folder: Path) -> None:
    one, other = folder / "disk-vda.qcow2", folder / "disk-vdb.qcow2"
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)


def _manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A sound manifest of something else."""

    def spoil(folder: Path) -> None:
        path = folder / "manifest.json"
        archive = json.loads(json.loads(path.read_text())["archive"])
        change(archive)
        text = json.dumps(archive)
        path.write_text(json.dumps({"archive": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}))

    return spoil


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "ram": (_flipped("ram.zst"), "ram.zst"),
    "state": (_flipped("state.qcow2"), "state.qcow2"),
    "disk": (_flipped("disk-vdb.qcow2"), "disk-vdb"),
    "manifest": (_flipped("manifest.json"), "damaged"),
    "cut": (lambda f: os.truncate(f / "ram.zst", 1000), "ram.zst"),
    "gone": (lambda f: (f / "state.qcow2").unlink(), "state.qcow2"),
    "swapped": (_swapped, "disk-vda"),
    "mode": (lambda f: (f / "ram.zst").chmod(0o644), "user alone"),
    "folder": (lambda f: f.chmod(0o755), "user alone"),
    "another VM": (_manifest(lambda a: a["snapshot"].update(vm_uuid=NOBODY)), "another VM"),
    "another QEMU": (_manifest(lambda a: a["hardware"].update(qemu="99.1.0")), "QEMU 99.1.0"),
    "another machine": (_manifest(lambda a: a["hardware"].update(machine="pc-q35-99.0")), "pc-q35-99.0"),
    "another CPU": (_manifest(lambda a: a["hardware"].update(cpu="EPYC")), "EPYC"),
    "other memory": (_manifest(lambda a: a["snapshot"]["regions"][0].update(size=64 * MIB)), "memory"),
    "another disk": (_manifest(lambda a: a["disks"][0].update(overlay="/elsewhere.qcow2")), "disk vda"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_not_whole_or_not_of_this_vm_is_refused(site: Site, kept: Kept, tmp_path: Path, case: str) -> None:
    spoil, why = DAMAGED[case]
    copy = tmp_path / "copy"
    shutil.copytree(kept.folder, copy)
    spoil(copy)
    assert why in site.refused(5, "snapshot", "load", kept.guest.name, str(copy))
    assert_off_as_before(site, kept)


def test_other_features_of_the_cpu_show_in_the_new_process(site: Site, kept: Kept, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(kept.folder, copy)
    _manifest(lambda a: a["hardware"].update(features="other words"))(copy)
    assert "other features" in site.refused(8, "snapshot", "load", kept.guest.name, str(copy))
    assert_off_as_before(site, kept)


def test_a_device_that_the_vm_got_or_lost_since_is_in_the_way(site: Site, kept: Kept, tmp_path: Path) -> None:
    """Also one of the same kind in another slot: QEMU would look for its state under that slot's name."""
    guest, device = kept.guest, tmp_path / "rng.xml"
    own = guest.xml(inactive=True).find("devices/rng")
    assert own is not None
    device.write_text(RNG)
    virsh("attach-device", guest.uuid, str(device), "--config")
    said = site.refused(5, "snapshot", "load", guest.name, str(kept.folder))
    assert "device 'rng virtio" in said
    assert "is new" in said
    device.write_text(ElementTree.tostring(own, encoding="unicode"))
    virsh("detach-device", guest.uuid, str(device), "--config")
    said = site.refused(5, "snapshot", "load", guest.name, str(kept.folder))
    assert "is gone" in said
    assert "is new" in said
    virsh("detach-device-alias", guest.uuid, "ua-extra", "--config")
    virsh("attach-device", guest.uuid, str(device), "--config")
    assert_off_as_before(site, kept)
    site.ok("snapshot", "load", guest.name, str(kept.folder))
    assert_as_then(guest)


def test_without_room_it_is_refused_with_numbers(site: Site, kept: Kept) -> None:
    said = site.refused(5, "snapshot", "load", kept.guest.name, str(kept.folder), env={"HVCTL_SNAPSHOT_BUDGET": "8MiB"})
    assert "no room" in said
    assert "MiB" in said
    assert "memory" in site.refused(
        5, "snapshot", "load", kept.guest.name, str(kept.folder), env={"HVCTL_MEMORY_OVERCOMMIT": "0.001"}
    )
    assert_off_as_before(site, kept)


def test_a_state_that_libvirt_holds_is_in_the_way(site: Site, kept: Kept) -> None:
    guest = kept.guest
    virsh("start", guest.uuid)
    guest.await_answer()
    virsh("managedsave", guest.uuid)
    try:
        disks = sums(guest)
        assert "saved state" in site.refused(8, "snapshot", "load", guest.name, str(kept.folder))
        assert sums(guest) == disks
    finally:
        virsh("managedsave-remove", guest.uuid)
    assert guest.state == "shut off"


STEPS = (
    *("import_snapshot", "place_disks", "start", "bind_snapshot", "restore_ram", "load_state", "audit"),
    *("release_disks", "resume", "await_life", "restore_balloon", "set_record"),
)
# Nothing happens between the end of one and the beginning of the next: each place once, as a load boots a guest. The
# fake host is killed at both.
POINTS = [f"{where}:after" for where in ("row", "begun", "touching", *STEPS[:7], "committed", *STEPS[7:], "closed")]
COMMITTED = POINTS.index("committed:after")


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_load_is_undone_or_finished(site: Site, kept: Kept, point: str) -> None:
    guest = kept.guest
    done = site.run("snapshot", "load", guest.name, str(kept.folder), fault=f"snapshot-load:{point}=kill")
    assert done.returncode == -signal.SIGKILL, (done.stdout, done.stderr)
    torn = guest.state == "running" and POINTS.index(point) < POINTS.index("resume:after")
    assert not torn
    recovered = site.json("recover")
    assert site.open_rows() == []
    if POINTS.index(point) < COMMITTED:
        assert [o["state"] for o in recovered] == ["undone"]
        assert_off_as_before(site, kept)
        return
    assert [o["state"] for o in recovered] == ([] if point == "closed:after" else ["done"])
    assert_as_then(guest)
    assert snapshots(site, guest) == {"s": "ready"}
    assert not list(guest.overlays()[0].parent.glob("*.old"))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("load_state:after", "destroy:after"),
        ("place_disks:after", "return_disks:after"),
        ("committed:after", "release_disks:after"),
        ("release_disks:after", "resume:after"),
    ],
)
def test_a_recovery_that_is_killed_too(site: Site, kept: Kept, first: str, second: str) -> None:
    guest = kept.guest
    load = ("snapshot", "load", guest.name, str(kept.folder))
    assert site.run(*load, fault=f"snapshot-load:{first}=kill").returncode == -signal.SIGKILL
    assert site.run("recover", fault=f"recover-snapshot-load:{second}=kill").returncode == -signal.SIGKILL
    (recovered,) = site.json("recover")
    if recovered["state"] == "undone":
        assert_off_as_before(site, kept)
    else:
        assert recovered["state"] == "done"
        assert_as_then(guest)


@pytest.mark.parametrize("point", ["bind_snapshot:before", "restore_ram:after", "load_state:before", "audit:after"])
def test_a_qemu_that_dies_in_the_middle(site: Site, kept: Kept, point: str) -> None:
    guest = kept.guest
    load = site.spawn("snapshot", "load", guest.name, str(kept.folder), fault=f"snapshot-load:{point}=stop")
    await_stopped(load)
    pid = guest.pid
    os.kill(pid, signal.SIGKILL)
    await_true(lambda: not alive(pid) and guest.state == "shut off", "libvirt sees that QEMU is gone")
    load.send_signal(signal.SIGCONT)
    status, said = ended(load)
    assert status in (4, 8, 9), said
    assert "Traceback" not in said
    site.ok("recover")
    assert_off_as_before(site, kept)


@pytest.mark.parametrize("lost", [False, True])
def test_a_host_that_goes_down_in_the_middle(site: Site, kept: Kept, lost: bool) -> None:
    guest = kept.guest
    load = ("snapshot", "load", guest.name, str(kept.folder))
    assert site.run(*load, fault="snapshot-load:load_state:after=kill").returncode == -signal.SIGKILL
    if lost:
        restart_host(site, guest)
    else:
        virsh("destroy", guest.uuid)
    assert [o["state"] for o in site.json("recover")] == ["undone"]
    assert_off_as_before(site, kept)


def test_a_guest_that_somebody_resumed_in_the_middle_is_quarantined(site: Site, kept: Kept) -> None:
    guest = kept.guest
    load = ("snapshot", "load", guest.name, str(kept.folder))
    assert site.run(*load, fault="snapshot-load:restore_ram:after=kill").returncode == -signal.SIGKILL
    virsh("resume", guest.uuid)
    (recovered,) = site.json("recover")
    assert recovered["state"] == "quarantined"
    assert guest.state == "running"
    old = list(guest.overlays()[0].parent.glob("*.old"))
    assert len(old) == 2
    assert "quarantined" in site.refused(5, "allocate", guest.name, "--cpu-quota", "90%")
    site.ok("vm", "stop", guest.name, "--force")
    # The operator puts them back, as the reason says.
    for path in old:
        path.replace(path.with_name(path.name.split(".qcow2")[0] + ".qcow2"))
    for path in guest.overlays()[0].parent.glob("load.json"):
        path.unlink()
    assert sums(guest) == kept.disks
    site.ok("snapshot", "load", guest.name, str(kept.folder))
    assert_as_then(guest)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("point", ["row:after", "write_archive:before", "write_archive:after", "publish_archive:after"])
def test_a_killed_save_is_whole_or_not_there(site: Site, vm: Guest, shelf: Path, point: str) -> None:
    site.ok("snapshot", "take", vm.name, "s")
    try:
        folder = shelf / "killed"
        save = ("snapshot", "save", vm.name, "s", "--to", str(folder))
        assert site.run(*save, fault=f"snapshot-save:{point}=kill").returncode == -signal.SIGKILL
        assert vm.state == "running"
        (recovered,) = site.json("recover")
        assert recovered["state"] == ("done" if point == "publish_archive:after" else "undone")
        assert not list(shelf.glob(".*"))
        if recovered["state"] == "undone":
            assert not folder.exists()
            site.ok(*save)
        assert "running" in site.refused(5, "snapshot", "load", vm.name, str(folder))
        shutil.rmtree(folder)
    finally:
        site.ok("snapshot", "delete", vm.name, "s")


@pytest.mark.usefixtures("nothing_left")
def test_the_difference_of_two_snapshots_is_what_was_written(site: Site, vm: Guest) -> None:
    vm.run("head -c 4194304 /dev/zero | tr '\\0' a > /run/block; head -c 2097152 /dev/urandom > /data/block; sync")
    site.ok("snapshot", "take", vm.name, "a")
    try:
        none = site.json("snapshot", "diff", vm.name, "a", "a")
        assert [p["bytes"] for p in (*none["ram"], *none["disks"])] == [0, 0]
        vm.run("head -c 4194304 /dev/zero | tr '\\0' b > /run/block; head -c 2097152 /dev/urandom > /data/block; sync")
        site.ok("snapshot", "take", vm.name, "b")
        found = site.json("snapshot", "diff", vm.name, "a", "b")
        (ram,), (disk,) = found["ram"], found["disks"]
        assert ram["region"] == "pc.ram"
        for part in (ram, disk):
            assert sum(r["end"] - r["start"] for r in part["ranges"]) == part["bytes"]
            assert all(a["end"] < b["start"] for a, b in zip(part["ranges"], part["ranges"][1:], strict=False))
        assert 4 * MIB <= ram["bytes"] < 64 * MIB
        assert 2 * MIB <= disk["bytes"] < 8 * MIB
        assert (disk["target"], disk["cluster"]) == ("vda", 65536)
        assert site.json("snapshot", "diff", vm.name, "b", "a") == found
        shown = site.ok("snapshot", "diff", vm.name, "a", "b")
        assert "ram pc.ram" in shown
        assert "disk vda" in shown
        assert "no snapshot none" in site.refused(3, "snapshot", "diff", vm.name, "a", "none")
    finally:
        site.ok("snapshot", "delete", vm.name, "b")
        site.ok("snapshot", "delete", vm.name, "a")
