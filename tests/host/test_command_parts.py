"""hvctl reset of parts of a VM: each brings back what it names and nothing else, and what would tear a guest is refused
with the reason before anything is touched."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from host.loaded import Loaded
from host.marked import OWN, RANGE, Marked, Marks
from host.outside import MIB, Guest, await_true, virsh
from host.site import Site

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]


@pytest.fixture(scope="module")
def nothing_left(site: Site, pair: Marked) -> Iterator[None]:
    before = site.inventory()
    yield
    assert site.inventory() == before


@pytest.fixture(scope="module")
def old(command: Loaded, pair: Marked) -> Iterator[Marks]:
    """What snapshot s holds: /data is mounted, the first disk is not."""
    marks = pair.mark("old")
    command.ok("snapshot", "take", pair.guest.name, "s", "--own", pair.own)
    yield marks
    command.ok("snapshot", "delete", pair.guest.name, "s")


def reset(command: Loaded, pair: Marked, *options: str) -> Any:
    return command.json("reset", pair.guest.name, "--to", "s", *options)


def steps(done: Any) -> list[str]:
    return [s["name"] for s in done["steps"]]


# --- what is refused


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (("--only", "disk:data"), 5, "incoherent: the guest uses vdb"),
        (("--only", f"disk:vdb:{RANGE}"), 5, "incoherent: the guest uses vdb"),
        (("--keep", "disk:data"), 5, "the guest used vdb when the snapshot was taken, and it would stay as it is now"),
        (("--only", "ram,devices"), 5, "the guest used vdb when the snapshot was taken"),
        (("--only", "ram"), 5, "RAM would be of another moment than the devices' state"),
        (("--only", "devices"), 5, "the devices' state would be of another moment than RAM"),
        (("--only", "ram:0x1000-0x3000"), 5, "no application declared 0x1000-0x3000 its own"),
        (("--only", "ram:OVER"), 5, "no application declared"),
        (("--only", "disk:results,ram:OWN"), 5, "cannot go back together"),
        (("--only", f"ram,devices,disk:data,disk:vda:{RANGE}"), 5, "a range of a disk goes back alone"),
        (("--only", "disk:vdx"), 5, "its writable disks: vda, vdb"),
        (("--keep", "disk:vdx"), 5, "has no disk vdx"),
        (("--only", "disk:vda:0x100-0x200"), 5, "not made of whole sectors"),
        (("--only", "disk:vda:16MiB-64MiB"), 5, "is not a range of it"),
        (("--tracker", "soft-dirty"), 5, "soft-dirty"),
        (("--only", "everything"), 2, "'everything' is not a part of a VM"),
        (("--only", "ram,ram:OWN"), 2, "`ram` is all of it"),
        (("--only", "disks,disk:vda"), 2, "`disks` is all of them"),
        (("--only", "ram", "--keep", "disk:results"), 2, "give one of them"),
        (("--only", "ram:0x2000-0x1000"), 2, "ends before it starts"),
        (("--only", "ram:here"), 2, "has no range of bytes"),
        (("--policy", "none"), 3, "shipped: ci-runner, fuzzing, sandbox"),
    ],
)  # fmt: skip
def test_what_is_refused_touches_nothing(
    site: Site, command: Loaded, pair: Marked, old: Marks, options: tuple[str, ...], status: int, reason: str
) -> None:
    guest = pair.guest
    new = pair.mark("new")
    over = f"{pair.base:#x}-{pair.base + OWN + 4096:#x}"
    words = [o.replace("OWN", pair.own).replace("OVER", over) for o in options]
    done = command.run("reset", guest.name, "--to", "s", *words)
    assert (done.returncode, reason in done.stderr, "Traceback" in done.stderr) == (status, True, False), done.stderr
    assert (guest.state, pair.marks(), site.open_rows()) == ("running", new, [])


def test_a_reset_needs_a_snapshot_unless_its_parts_do_not(command: Loaded, pair: Marked, old: Marks) -> None:
    done = command.run("reset", pair.guest.name)
    assert (done.returncode, "--to NAME" in done.stderr) == (2, True)
    assert "does not exist" not in command.ok("reset", pair.guest.name, "--only", "net", "--dry-run")


# --- what it is called before it is done


@pytest.mark.parametrize(
    ("options", "coherence", "scope"),
    [
        ((), "coherent", ["ram", "devices", "all disks"]),
        (("--keep", "disk:results"), "coherent", ["ram", "devices", "all disks but results"]),
        (("--only", "disk:results"), "coherent", ["disk:results"]),
        (("--only", "ram,devices,disk:data"), "coherent", ["ram", "devices", "disk:data"]),
        (("--only", "ram:OWN"), "coherent", ["ram:OWN"]),
        (("--only", f"disk:vda:{RANGE}"), "crash-consistent", ["disk:vda:0x0-0x10000"]),
        (("--only", "disk:data", "--accept-incoherent"), "incoherent", ["disk:data"]),
        (("--only", "ram,net", "--accept-incoherent"), "incoherent", ["ram", "net"]),
    ],
)
def test_a_dry_run_tells_the_class_and_the_parts(
    command: Loaded, pair: Marked, old: Marks, options: tuple[str, ...], coherence: str, scope: list[str]
) -> None:
    told = reset(command, pair, *(o.replace("OWN", pair.own) for o in options), "--dry-run")
    assert told["state"] is None
    assert (told["result"]["coherence"], told["result"]["scope"]) == (
        coherence,
        [s.replace("OWN", pair.own) for s in scope],
    )
    assert (coherence == "coherent") == (told["reasons"] == [])


def test_a_dry_run_tells_what_earlier_ones_took(command: Loaded, pair: Marked, old: Marks) -> None:
    """Medians of resets of the same parts to the same snapshot, and of no others."""
    options = ("--only", "ram,devices,disks", "--tracker", "compare")
    assert reset(command, pair, *options, "--dry-run")["result"]["expected"] == {}
    taken = [reset(command, pair, *options)["result"] for _ in range(3)]
    told = reset(command, pair, *options, "--dry-run")["result"]["expected"]
    assert told["resets"] == 3
    for key in ("paused", "bytes"):
        assert told[key] == sorted(t[key] for t in taken)[1]
    lines = command.ok("reset", pair.guest.name, "--to", "s", *options, "--dry-run").splitlines()
    assert lines[-3:-1] == ["class: coherent", "parts: ram, devices, all disks"]
    assert (lines[-1].startswith("expected: "), lines[-1].endswith(" (of 3 resets)")) == (True, True)
    pair.guest.await_answer()


# --- what goes back


@pytest.mark.parametrize(
    ("options", "back"),
    [
        (("--keep", "disk:results"), ("ram", "file", "own")),
        (("--only", "ram,devices,disk:data"), ("ram", "file", "own")),
        (("--only", "disk:results"), ("released", "beyond")),
        (("--only", f"disk:vda:{RANGE}"), ("released",)),
        (("--only", "ram:OWN"), ("own",)),
        (("--policy", "ci-runner"), ("ram", "file", "own")),
        ((), ("ram", "file", "own", "released", "beyond")),
    ],
)
def test_a_part_goes_back_and_nothing_else(
    command: Loaded, pair: Marked, old: Marks, options: tuple[str, ...], back: tuple[str, ...]
) -> None:
    guest = pair.guest
    pid, disks = guest.pid, seen_by_libvirt(guest)
    new = pair.mark("new")
    done = reset(command, pair, *(o.replace("OWN", pair.own) for o in options))
    assert done["warnings"] == []
    guest.await_answer()
    assert pair.marks() == replace(new, **{place: getattr(old, place) for place in back})
    assert (guest.pid, guest.state, seen_by_libvirt(guest)) == (pid, "running", disks)


def seen_by_libvirt(guest: Guest) -> Any:
    """What virsh tells of the disks, and that it can ask QEMU for their nodes by the names it knows."""
    sizes = [guest.stats("domblkinfo", target)["Capacity"] for target in ("vda", "vdb")]
    return virsh("domblklist", guest.uuid), sizes, sorted(guest.stats("domblkstat", "vda"))


def test_a_range_of_memory_goes_back_while_the_rest_of_the_guest_keeps_working(
    command: Loaded, pair: Marked, old: Marks
) -> None:
    """A program that runs across the reset is the same one, and has counted on."""
    guest = pair.guest
    guest.run(
        "(i=0; while :; do i=$((i + 1)); echo $i > /run/next; mv /run/next /run/count; done) > /dev/null 2>&1 &"
        " echo $! > /run/counter; until [ -s /run/count ]; do sleep 0.1; done"
    )
    try:
        pair.mark("new")
        before = int(guest.run("cat /run/count"))
        done = reset(command, pair, "--only", f"ram:{pair.own}")
        assert "drop_snapshot" in steps(done)
        guest.await_answer()
        after = int(guest.run("kill -0 $(cat /run/counter) && cat /run/count"))
        assert after > before
        assert pair.marks().own == "old"
    finally:
        guest.run("kill $(cat /run/counter)")


# --- disks that the guest lets go of by hooks


def policy(folder: Path, **said: Any) -> str:
    path = folder / "policy.toml"
    path.write_text(
        "".join(f"{key} = {json.dumps(value)}\n" for key, value in {"description": "a test", **said}.items())
    )
    return str(path)


RELEASE = [["/bin/umount", "/data"], ["/sbin/blockdev", "--flushbufs", "/dev/vdb"]]
REGAIN = [["/sbin/blockdev", "--rereadpt", "/dev/vdb"], ["/bin/mount", "-t", "ext4", "/dev/vdb", "/data"]]


def test_a_mounted_disk_goes_back_between_its_hooks(command: Loaded, pair: Marked, old: Marks, tmp_path: Path) -> None:
    guest = pair.guest
    new = pair.mark("new")
    done = reset(command, pair, "--policy", policy(tmp_path, only=["disk:data"], before=RELEASE, after=REGAIN))
    assert steps(done)[:3] == ["run_in_guest", "run_in_guest", "check_released"]
    assert steps(done)[-3:] == ["run_in_guest", "run_in_guest", "ready_disk"]
    assert (done["warnings"], done["result"]["coherence"]) == ([], "coherent")
    assert pair.marks() == replace(new, file="old")
    assert "error" not in guest.run("dmesg | grep -i ext4 || true").lower()


def test_hooks_that_do_not_have_it_released_end_it_untouched(
    command: Loaded, pair: Marked, old: Marks, tmp_path: Path
) -> None:
    new = pair.mark("new")
    for hooks, said in (
        ([["/bin/true"]], "still uses vdb"),
        ([["/bin/umount", "/nowhere"]], "/bin/umount /nowhere ended"),
    ):
        done = command.run(
            "reset", pair.guest.name, "--to", "s", "--policy", policy(tmp_path, only=["disk:data"], before=hooks)
        )
        assert (done.returncode, said in done.stderr) == (5, True), done.stderr
        assert pair.marks() == new


def test_a_hook_that_fails_afterwards_is_said(command: Loaded, pair: Marked, old: Marks, tmp_path: Path) -> None:
    new = pair.mark("new")
    path = policy(tmp_path, only=["disk:results"], after=[["/bin/false"], ["/bin/sh", "-c", "echo went > /run/hook"]])
    done = reset(command, pair, "--policy", path)
    assert [w for w in done["warnings"] if "/bin/false ended with status 1" in w] == done["warnings"] != []
    assert pair.guest.run("cat /run/hook; rm /run/hook") == "went\n"
    assert pair.marks() == replace(new, released="old", beyond="old")


def test_a_policy_that_says_what_means_nothing_is_refused(
    command: Loaded, pair: Marked, old: Marks, tmp_path: Path
) -> None:
    for said, reason in (({"onyl": ["ram"]}, "'onyl'"), ({"audit": "often"}, "not one"), ({"tracker": "x"}, "not one")):
        done = command.run("reset", pair.guest.name, "--to", "s", "--policy", policy(tmp_path, **said))
        assert (done.returncode, reason in done.stderr) == (2, True), done.stderr


def test_a_disk_that_the_guest_calls_otherwise(
    site: Site, command: Loaded, pair: Marked, old: Marks, tmp_path: Path
) -> None:
    """vdz of libvirt is vdc in the guest: what tells is where it is plugged."""
    guest, disk = pair.guest, site.settings.vms_dir / pair.guest.uuid / "other.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "16M"], check=True)
    virsh("attach-disk", guest.uuid, str(disk), "vdz", "--live", "--subdriver", "qcow2", "--targetbus", "virtio")
    try:
        guest.run("until [ -b /dev/vdc ]; do sleep 0.1; done; mke2fs -q /dev/vdc; mkdir -p /other")
        command.ok("snapshot", "take", guest.name, "with")
        guest.run("mount -t ext2 /dev/vdc /other")
        done = command.run("reset", guest.name, "--to", "with", "--only", "disk:vdz")
        assert (done.returncode, "the guest uses vdz" in done.stderr) == (5, True), done
        guest.run("umount /other; blockdev --flushbufs /dev/vdc")
        command.ok("reset", guest.name, "--to", "with", "--only", "disk:vdz")
        command.ok("snapshot", "delete", guest.name, "with")
    finally:
        virsh("detach-disk", guest.uuid, "vdz", "--live")
        await_true(lambda: "vdz" not in virsh("domblklist", guest.uuid), "the disk is gone")
        disk.unlink()


# --- the shipped policies


def test_the_sandbox_proves_that_nothing_is_left(command: Loaded, pair: Marked, old: Marks) -> None:
    pair.mark("new")
    done = reset(command, pair, "--policy", "sandbox")
    assert (done["result"]["missed"], done["result"]["uniqueness"]) == (0, "reseeded")
    assert {"audit", "forget_flows", "set_nic_limit"} <= set(steps(done))
    pair.guest.await_answer()
    assert pair.marks() == old


def test_fuzzing_repeats_itself(command: Loaded, pair: Marked, old: Marks) -> None:
    """The same random numbers each time, and the time of the snapshot."""
    guest, found = pair.guest, set()
    for _ in range(2):
        done = reset(command, pair, "--policy", "fuzzing")
        assert (done["result"]["uniqueness"], "audit" in steps(done)) == ("not guaranteed", False)
        guest.await_answer()
        found.add(int(guest.run("date +%s")) - int(time.time()))
    assert max(found) < 0
    reset(command, pair)
    guest.await_answer()
    assert abs(int(guest.run("date +%s")) - time.time()) < 5


# --- what is around the guest


def test_the_network_path_is_made_anew(command: Loaded, pair: Marked) -> None:
    """Without a snapshot: the buckets are as promised again, whatever somebody did to them."""
    guest = pair.guest
    command.ok("allocate", guest.name, "--net-in", "8Mbit")
    (promised,) = shaping(guest)
    words = [
        "tc",
        "qdisc",
        "change",
        "dev",
        guest.tap,
        "root",
        "tbf",
        "rate",
        "8mbit",
        "burst",
        "9000",
        "limit",
        "90000",
    ]
    subprocess.run(words, check=True)
    assert shaping(guest) != [promised]
    done = command.json("reset", guest.name, "--only", "net")
    assert steps(done) == ["drop_queues", "forget_flows", "set_nic_limit"]
    assert shaping(guest) == [promised]
    command.ok("allocate", guest.name, "--net-in", "none")


def shaping(guest: Guest) -> list[Any]:
    found = json.loads(subprocess.check_output(["tc", "-j", "qdisc", "show", "dev", guest.tap]))
    return [q["options"] for q in found if q["kind"] == "tbf"]


def test_the_cache_goes_back_to_the_host(command: Loaded, pair: Marked) -> None:
    guest, size = pair.guest, 16 * MIB
    total = guest.mem_total()
    guest.run(f"dd if=/dev/zero of=/data/big bs=1M count={size // MIB}; sync; cat /data/big > /dev/null")
    done = command.json("reset", guest.name, "--only", "cache")
    (facts,) = (s["facts"] for s in done["steps"])
    assert facts["won"] == facts["before"] - facts["after"] > size // 2
    assert (guest.mem_total(), guest.memory()) == (total, 128 * MIB)
    guest.run("rm /data/big")
