"""One disk of a running VM goes back to a snapshot, looked at from outside: qemu-img, libvirt, /proc and the guest."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from host.outside import patient
from hvctl.adapters.disks import diskfiles, diskpart, diskseat, diskspare
from hvctl.adapters.disks.diskfiles import Files
from hvctl.adapters.disks.diskswap import restore_disk
from hvctl.adapters.guest import guestdisk
from hvctl.adapters.images import imagestore
from hvctl.adapters.qemu import qemuimg
from hvctl.errors import GuestError, HvctlError, RefusedError, UnreachableError
from hvctl.settings import Settings
from tests.contract.outside import MIB, made
from tests.contract.real import RealOutside, real_outside
from tests.host.diskpart import SIZE, Guest, content, die_at, images, two_disks, virsh

pytestmark = pytest.mark.host

SWAPS = 50
CLUSTER = 65536
# Every step of a reset at which a process can be killed; a test compares it with those there are.
STEPS = [
    *("keep", "add-back-file", "add-back", "add-standin-file", "add-standin", "iothreads", "set-standin"),
    *("del-format", "del-storage", "rename", "add-storage", "add-format", "mirror", "complete", "dismiss"),
    *("del-standin", "del-standin-file", "del-back", "del-back-file", "clean"),
]
RANDOM = "head -c {size} /dev/urandom | dd of=/dev/vdb bs=64k seek={block} conv=fsync 2>/dev/null"


@pytest.fixture(scope="module")
def outside(scrubbed_environment: None) -> Iterator[RealOutside]:
    with real_outside() as real:
        yield real


@pytest.fixture(scope="module")
def shared(outside: RealOutside, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """Its second disk lies on a base image, with a file system where the guest keeps marks."""
    spec = two_disks(outside.spec())
    base = images(spec) / "base.raw"
    base.parent.mkdir(mode=0o755)
    with base.open("wb") as raw:
        raw.truncate(SIZE)
        raw.seek(8 * MIB)
        raw.write(b"base" * (MIB // 2))
    base.chmod(0o644)
    extra = replace(spec.disks[1], backing=str(base), backing_format="raw")
    with made(outside, replace(spec, disks=(spec.disks[0], extra)), start=True) as uuid:
        guest = Guest(outside, uuid)
        guest.sh("mkdir -p /extra")
        yield guest


@pytest.fixture
def guest(shared: Guest) -> Iterator[Guest]:
    """Blank again at the end: no snapshot, no file of a reset, nothing mounted."""
    before = shared.files(), set(shared.nodes()), shared.devices()
    shared.sh("/sbin/mke2fs -q -t ext4 -F /dev/vdb 6m")
    yield shared
    if shared.status() == "paused":
        virsh("resume", shared.uuid)
    shared.sh("while grep -q /extra /proc/mounts; do umount /extra; done")
    for tag in list(shared.tags):
        shared.delete(tag)
    diskspare.forget(shared.overlay())
    assert (shared.files(), set(shared.nodes()), shared.devices()) == before


def write(guest: Guest, word: str) -> None:
    """A mark on both disks and in RAM, and much more on vdb, in its file system and behind it."""
    guest.sh(f"echo {word} > /data/mark; echo {word} > /run/mark; sync")
    guest.sh("mount /dev/vdb /extra; head -c 200k /dev/urandom > /extra/$(date +%s%N); "
             f"echo {word} > /extra/mark; umount /extra")  # fmt: skip
    guest.sh(RANDOM.format(size="300k", block=160))


def marks(guest: Guest) -> list[str]:
    """Of RAM, the first disk and the second."""
    return guest.sh("mount -o ro /dev/vdb /extra; cat /run/mark /data/mark /extra/mark; umount /extra").split()


# --- what comes back and what stays


def test_one_disk_goes_back_and_nothing_else(guest: Guest, tmp_path: Path) -> None:
    write(guest, "then")
    digest = guest.digest()
    guest.take("one")
    write(guest, "now")
    assert guest.digest() != digest
    life = guest.vm.process
    with guest.paused():
        first = content(guest.overlay("vda"), tmp_path / "raw")
        assert not guest.back("one").running
        assert content(guest.overlay("vda"), tmp_path / "raw") == first
        assert content(guest.overlay(), tmp_path / "raw") == digest
    assert guest.digest() == digest == content(guest.overlay(), tmp_path / "raw", "one")
    assert marks(guest) == ["now", "now", "then"]
    assert guest.vm.process == life
    assert guest.status() == "running"


def test_whole_resets_and_disks_in_any_order(guest: Guest, tmp_path: Path) -> None:
    """A disk that was put back holds all snapshots as it did."""
    digests = {}
    for tag in ("one", "two"):
        write(guest, tag)
        digests[tag] = guest.digest()
        guest.take(tag)
    for tag in ("two", "one"):
        write(guest, "now")
        guest.back(tag)
        assert guest.digest() == digests[tag]
        assert marks(guest) == ["now", "now", tag]
        for whole in ("one", "two"):
            guest.reset_all(whole)
            assert guest.digest() == digests[whole]
            assert marks(guest) == [whole] * 3
    write(guest, "three")
    digests["three"] = guest.digest()
    guest.take("three")
    guest.back("one")
    guest.reset_all("three")
    assert guest.digest() == digests["three"]
    guest.delete("two")
    for tag in ("one", "three"):
        guest.back(tag)
        assert guest.digest() == digests[tag] == content(guest.overlay(), tmp_path / "raw", tag)
    with guest.paused():
        qemuimg.check(_copied(guest.overlay(), tmp_path))


def _copied(overlay: Path, folder: Path) -> Path:
    subprocess.run(["cp", "--sparse=always", overlay, folder / "copy"], check=True)
    return folder / "copy"


def test_a_prepared_reset_is_used_as_long_as_it_fits(guest: Guest) -> None:
    write(guest, "then")
    digest = guest.digest()
    guest.take("one")
    plan = guest.prepare("one")
    write(guest, "now")
    with guest.monitor() as qmp:
        seat = guest.seat(qmp)
        found = diskspare.prepared(guest.overlay())
        assert found == plan
        assert diskspare.fits(found, seat, "one")
        assert not diskspare.fits(found, seat, "other")
        assert not diskspare.fits(found, seat, "one", (0, 512))
        restore_disk(qmp, found)
        assert not diskspare.fits(found, guest.seat(qmp), "one")
    assert guest.digest() == digest
    pristine = Files(guest.overlay()).pristine("one")
    made_at = pristine.stat().st_mtime_ns
    plan = guest.prepare("one")
    assert pristine.stat().st_mtime_ns == made_at
    guest.take("two")
    with guest.monitor() as qmp:
        assert not diskspare.fits(plan, guest.seat(qmp), "one")
        with pytest.raises(RefusedError, match="does not fit any more"):
            restore_disk(qmp, plan)
    write(guest, "now")
    guest.back("one")
    assert pristine.stat().st_mtime_ns != made_at
    assert guest.digest() == digest
    assert set(qemuimg.list_internal_snapshots(guest.overlay())) == {"one", "two"}


def test_a_guest_that_writes_while_a_copy_is_made(guest: Guest, tmp_path: Path) -> None:
    """The copy is whole all the same: the snapshot's bytes, and an image without damage."""
    write(guest, "then")
    digest = guest.digest()
    guest.take("one")
    loop = "while [ -e /run/busy ]; do head -c 100k /dev/urandom | dd of=/dev/vdb bs=64k seek=200 conv=fsync; done"
    guest.sh(f"touch /run/busy; ({loop}) > /dev/null 2>&1 &")
    patient(lambda: guest.outside.host.domains.agent(guest.uuid, "guest-ping", {}, 5.0))
    plan = guest.prepare("one")
    guest.sh("rm /run/busy; sync")
    files = Files(guest.overlay())
    assert content(files.pristine("one"), tmp_path / "raw") == digest
    qemuimg.check(files.spare)
    assert guest.status() == "running"
    assert guest.restore(plan).running
    assert guest.digest() == digest


# --- libvirt


def test_libvirt_sees_no_difference(guest: Guest) -> None:
    guest.take("one")
    limits = ("--total-iops-sec", "300", "--total-bytes-sec", "1048576")
    virsh("blkdeviotune", guest.uuid, "vdb", *limits)
    virsh("domblkthreshold", guest.uuid, "vdb", str(10 << 30))

    def told() -> list[str]:
        commands = (["dumpxml"], ["domblklist", "--details"], ["domstate", "--reason"])
        return [virsh(c, guest.uuid, *rest) for c, *rest in commands] + [
            virsh("blkdeviotune", guest.uuid, "vdb"),
            str(guest.ask("query-block")[1]["inserted"]["iops"]),
            re.sub("Allocation.*|Physical.*", "", virsh("domblkinfo", guest.uuid, "vdb")),
            str(sorted((name, n["write_threshold"]) for name, n in guest.nodes().items())),
        ]

    def written() -> int:
        found = re.search(r"wr_bytes\s+(\d+)", virsh("domblkstat", guest.uuid, "vdb"))
        assert found is not None
        return int(found[1])

    before, bytes_before = told(), written()
    guest.sh(RANDOM.format(size="64k", block=0))
    guest.back("one")
    assert told() == before
    # The device counts on.
    assert written() >= bytes_before + 64 * 1024
    # At 1 MiB a second, of which the first second may be had at once: less time than this cannot pass.
    start = time.monotonic()
    guest.sh("dd if=/dev/vdb of=/dev/null bs=64k count=48 iflag=direct")
    assert time.monotonic() - start >= 1.0
    virsh("blkdeviotune", guest.uuid, "vdb", "--total-iops-sec", "0", "--total-bytes-sec", "0")
    virsh("domblkthreshold", guest.uuid, "vdb", "0")


def _options(nodes: dict[str, Any]) -> dict[str, str]:
    return {name: diskseat.look(node) for name, node in nodes.items()}


def test_options_of_a_node_from_either_source_are_the_same(guest: Guest) -> None:
    """A disk that was there at the start: the command line's, and what would be made of libvirt's words."""
    with guest.monitor() as qmp:
        seat = guest.seat(qmp)
        seen = diskseat.sight(qmp.execute_all(diskseat.QUESTIONS))
    driver = diskseat.disk_driver(virsh("dumpxml", guest.uuid), "vdb")
    plugged = diskseat._plugged(seen.nodes[seat.nodes[0]], driver, seen)
    assert plugged == ({**seat.format, "detect-zeroes": "off"}, seat.storage)


def test_a_disk_that_was_plugged(guest: Guest) -> None:
    image = guest.overlay().with_name("plugged.qcow2")
    qemuimg.create_empty(image, 8 * MIB)
    os.chown(image, *guest._owner())
    options = ("--subdriver", "qcow2", "--cache", "none", "--io", "threads", "--live")
    virsh("attach-disk", guest.uuid, str(image), "vdc", *options)
    try:
        guest.sh("until [ -e /dev/vdc ]; do usleep 20000; done; echo then | dd of=/dev/vdc conv=fsync")
        guest.take("one")
        digest = guest.digest("/dev/vdc")
        guest.sh("echo now | dd of=/dev/vdc conv=fsync")
        before = guest.nodes()
        guest.restore(guest.prepare("one", target="vdc"))
        assert guest.digest("/dev/vdc") == digest
        assert _options(guest.nodes()) == _options(before)
        guest.delete("one")
    finally:
        diskspare.forget(image)
        virsh("detach-disk", guest.uuid, "vdc", "--live")
        while "vdc" in virsh("domblklist", guest.uuid):
            time.sleep(0.05)
        image.unlink()


# --- killed, refused, failed


@pytest.mark.parametrize("steps", [STEPS[:7], STEPS[7:13], STEPS[13:]], ids=lambda s: s[0])
def test_killed_at_every_step(guest: Guest, steps: list[str]) -> None:
    write(guest, "then")
    digest = guest.digest()
    guest.take("one")
    nodes, names = _options(guest.nodes()), list[str]()
    with guest.monitor() as qmp:
        plan = diskspare.prepare(qmp, guest.seat(qmp), "one")
        restore_disk(qmp, plan, at=names.append)
    assert names == STEPS
    for step in steps:
        guest.sh(RANDOM.format(size="100k", block=STEPS.index(step) * 8))
        guest.prepare("one")
        assert die_at(guest, step), f"there is no step {step}"
        assert guest.status() == "running", step
        assert diskspare.begun(guest.overlay()) == (step != "keep")
        plan = diskspare.prepared(guest.overlay())
        assert plan is not None
        assert guest.restore(plan).running
        assert guest.digest() == digest, step
        assert _options(guest.nodes()) == nodes
        assert guest.ask("query-jobs") == []
        left = (".old", ".spare", ".hvctl-standin", ".hvctl-backing")
        assert not any(p.name.endswith(left) for p in guest.overlay().parent.iterdir())


def test_a_guest_works_on_after_a_kill(guest: Guest) -> None:
    """It has the snapshot's disk, though libvirt does not know it yet, and keeps what it writes there."""
    write(guest, "then")
    digest = guest.digest()
    guest.take("one")
    write(guest, "now")
    guest.prepare("one")
    assert die_at(guest, "add-format")
    assert (guest.status(), guest.digest()) == ("running", digest)
    write(guest, "since")
    since = guest.digest()
    with pytest.raises(RefusedError, match="interrupted"):
        guest.prepare("one")
    plan = diskspare.prepared(guest.overlay())
    assert plan is not None
    assert guest.restore(plan).running
    assert guest.digest() == since
    assert marks(guest) == ["since"] * 3
    guest.reset_all("one")
    assert guest.digest() == digest


def test_what_is_written_during_a_reset_stays(guest: Guest) -> None:
    """A guest goes on writing to a disk that it should have let go of. Each write has a cluster of its own, so that
    none is copied along with another, and is told to the guest's RAM once it is on the disk."""
    guest.take("one")
    put = "printf %08d $i | dd of=/dev/vdb bs=64k seek=$i conv=notrunc,fsync && echo $i > /run/told"
    turn = f"if [ $i -lt $(cat /run/goal) ]; then i=$((i + 1)); {put}; else usleep 2000; fi"
    guest.sh(f"echo 0 > /run/goal; touch /run/busy; (i=0; while [ -e /run/busy ]; do {turn}; done) > /dev/null 2>&1 &")
    told: list[int] = []

    def five_more() -> None:
        told.append(goal := len(told) * 5 + 5)
        guest.sh(f"echo {goal} > /run/goal; until [ 0$(cat /run/told) -ge {goal} ]; do usleep 5000; done")

    def at(step: str) -> None:
        """Some are written between any two of the steps at which that may be lost."""
        if step in ("set-standin", "del-format", "mirror", "complete", "dismiss"):
            five_more()

    plan = guest.prepare("one")
    with guest.monitor() as qmp:
        restore_disk(qmp, plan, at=at)
    five_more()
    guest.sh("rm /run/busy; blockdev --flushbufs /dev/vdb")
    read = "dd if=/dev/vdb bs=8 skip=$((i * 8192)) count=1 2> /dev/null | tr -d '\\000'"
    found = guest.sh(f'for i in $(seq 1 {told[-1]}); do [ "$({read})" = $(printf %08d $i) ] && echo $i; done; :')
    assert [int(i) for i in found.split()] == list(range(told[0] + 1, told[-1] + 1))


@pytest.mark.parametrize(("kind", "why"), [("spare", "Permission denied"), ("standin", "qcow2"), ("backing", "qcow2")])
def test_a_file_that_qemu_cannot_open(guest: Guest, kind: str, why: str) -> None:
    guest.take("one")
    write(guest, "then")
    digest, nodes = guest.digest(), _options(guest.nodes())
    plan = guest.prepare("one")
    file = getattr(Files(guest.overlay()), kind)
    if kind == "spare":
        file.chmod(0)
    else:
        file.unlink()
        file.write_text("damaged")
    with pytest.raises(HvctlError, match=rf"was not reset: .*{why}"):
        guest.restore(plan)
    assert guest.status() == "running"
    assert guest.digest() == digest
    assert _options(guest.nodes()) == nodes
    guest.sh(RANDOM.format(size="64k", block=1))
    assert guest.digest() != digest
    guest.back("one")
    assert guest.digest() != digest


def test_what_qemu_only_reads_it_cannot_change(guest: Guest) -> None:
    """What every later reset puts in stays what it is, whoever has taken QEMU over; and it is ours alone but for the
    time of a reset, since the rules for AppArmor let every QEMU open a file of that name."""
    guest.take("one")
    plan, files, (user, group) = guest.prepare("one"), Files(guest.overlay()), guest._owner()
    assert user != os.geteuid()

    def owned() -> list[tuple[int, int, int]]:
        seen = [f.stat() for f in (files.backing, files.pristine("one"), files.standin)]
        return [(s.st_uid, s.st_gid, s.st_mode & 0o022) for s in seen]

    def at(step: str) -> None:
        if step == "mirror":
            assert owned() == [(os.geteuid(), group, 0)] * 2 + [(user, group, 0)]
            links = [fd for fd in Path(f"/proc/{guest.pid}/fd").iterdir() if str(fd.readlink()) == str(files.backing)]
            infos = [Path(f"/proc/{guest.pid}/fdinfo/{fd.name}").read_text() for fd in links]
            modes = {int(re.findall(r"flags:\s+(\d+)", info)[0], 8) & os.O_ACCMODE for info in infos}
            assert modes == {os.O_RDONLY}
            looked.append(step)

    looked: list[str] = []
    for _ in range(2):
        assert all(f.stat().st_uid == os.geteuid() for f in (files.backing, files.standin))
        assert files.backing.stat().st_mode & 0o777 == 0o600
        with guest.monitor() as qmp:
            restore_disk(qmp, plan, at=at)
        plan = guest.prepare("one")
    assert len(looked) == 2


def test_a_node_that_is_exported(guest: Guest, tmp_path: Path) -> None:
    guest.take("one")
    write(guest, "now")
    digest, plan = guest.digest(), guest.prepare("one")
    place = guest.overlay().parent / "qmp" / "nbd"
    guest.ask("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(place)}}})
    node = plan.seat.nodes[0]
    guest.ask("block-export-add", {"type": "nbd", "id": "e", "node-name": node, "name": "e", "writable": False})
    try:
        with pytest.raises(HvctlError, match=r"was not reset: .*in use"):
            guest.restore(plan)
        assert guest.status() == "running"
        assert guest.digest() == digest
    finally:
        guest.ask("nbd-server-stop")
    guest.back("one")
    assert guest.digest() != digest


def test_qemu_dies_while_a_disk_is_on_its_stand_in(outside: RealOutside, tmp_path: Path) -> None:
    """The disk is whole, the one from before or the one that it went back to, and nothing is in the way of another."""
    with made(outside, two_disks(outside.spec()), start=True) as uuid:
        guest = Guest(outside, uuid)
        guest.sh(RANDOM.format(size="1m", block=0))
        digest = guest.digest()
        for step, back in (("del-format", False), ("mirror", True)):
            guest.take(step)
            guest.sh(RANDOM.format(size="1m", block=0))
            now, plan = guest.digest(), guest.prepare(step)

            def at(name: str, step: str = step, guest: Guest = guest) -> None:
                if name == step:
                    outside.kill(guest.vm)

            with guest.monitor() as qmp, pytest.raises(UnreachableError):
                restore_disk(qmp, plan, at=at)
            assert (diskfiles.identity(guest.overlay()) == plan.spare) == back
            qemuimg.check(_copied(guest.overlay(), tmp_path))
            assert content(guest.overlay(), tmp_path / "raw") == (digest if back else now)
            outside.host.domains.start(uuid)
            outside.await_guest(uuid)
            digest = guest.digest()
            diskpart.forget([guest.overlay()], guest.vm.process)
            assert not [f for f in guest.files() if f.startswith("extra.qcow2.")]


def test_what_cannot_be_reset_is_refused_before_anything(guest: Guest) -> None:
    guest.take("one")
    with guest.monitor() as qmp:
        seat = guest.seat(qmp)

        def refused(match: str, tag: str = "one", extent: tuple[int, int] | None = None) -> None:
            with pytest.raises(RefusedError, match=match):
                diskspare.prepare(qmp, seat, tag, extent)

        refused("does not hold the snapshot other", "other")
        refused("is not a range of it", extent=(0, SIZE + 512))
        refused("is not a range of it", extent=(-512, 512))
        refused("is not a range of it", extent=(512, 512))
        refused("whole sectors of 512 bytes", extent=(1, 512))
        refused("whole sectors of 512 bytes", extent=(0, 1000))
        guest.ask("block-dirty-bitmap-add", {"node": seat.nodes[0], "name": "map"})
        with pytest.raises(RefusedError, match="dirty bitmap"):
            guest.seat(qmp)
        guest.ask("block-dirty-bitmap-remove", {"node": seat.nodes[0], "name": "map"})
    assert not Files(guest.overlay()).plan.exists()


def test_a_folder_that_others_can_change(guest: Guest) -> None:
    guest.take("one")
    folder = guest.overlay().parent
    folder.chmod(0o777)
    try:
        with pytest.raises(RefusedError, match="can be changed by others"):
            guest.prepare("one")
    finally:
        folder.chmod(0o711)


def test_a_disk_with_a_thread_of_its_own(outside: RealOutside) -> None:
    """QEMU gives a disk back to its main thread while the guest stands still, and refuses to change it else: so the
    guest is stopped for the exchange, and paused if that is killed."""
    with made(outside, two_disks(outside.spec())) as uuid:
        document = virsh("dumpxml", "--inactive", uuid).replace("<os>", "<iothreads>1</iothreads><os>", 1)
        before, after = document[: document.index("extra.qcow2")], document[document.index("extra.qcow2") :]
        head, _, tail = before.rpartition("<driver ")
        outside.host.domains.redefine(uuid, f"{head}<driver iothread='1' {tail}{after}")
        outside.host.domains.start(uuid)
        outside.await_guest(uuid)
        guest = Guest(outside, uuid)
        assert "iothread='1'" in virsh("dumpxml", uuid)
        guest.sh(RANDOM.format(size="100k", block=0))
        digest = guest.digest()
        guest.take("one")
        guest.sh(RANDOM.format(size="100k", block=0))
        nodes = _options(guest.nodes())
        guest.prepare("one")
        assert die_at(guest, "cont")
        assert guest.status() == "paused"
        plan = diskspare.prepared(guest.overlay())
        assert plan is not None
        assert not guest.restore(plan).running
        virsh("resume", uuid)
        assert guest.digest() == digest
        guest.sh(RANDOM.format(size="100k", block=0))
        swapped = guest.back("one")
        assert swapped.paused == swapped.away > 0
        assert guest.digest() == digest
        assert _options(guest.nodes()) == nodes
        diskspare.forget(guest.overlay())
        guest.delete("one")


# --- ranges


def test_a_range_goes_back_and_the_rest_stays(guest: Guest, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    guest.sh(RANDOM.format(size="2m", block=0))
    guest.sh("dd if=/dev/zero of=/dev/vdb bs=64k seek=12 count=8 conv=fsync 2>/dev/null")
    guest.take("one")
    content(guest.overlay(), raw, "one")
    then = raw.read_bytes()
    guest.sh(RANDOM.format(size="3m", block=0) + ";" + RANDOM.format(size="200k", block=130))
    guest.take("two")
    guest.sh(RANDOM.format(size="2500k", block=0))
    with guest.paused():
        content(guest.overlay(), raw)
    now = raw.read_bytes()
    room = guest.overlay().stat().st_blocks
    # From the middle of a cluster to the middle of another, zeroes of the snapshot between; then the base image's.
    for start, end in ((5 * CLUSTER + 512, 25 * CLUSTER + 1024), (8 * MIB, 9 * MIB), (SIZE - 512, SIZE)):
        guest.back("one", (start, end))
        now = now[:start] + then[start:end] + now[end:]
        with guest.paused():
            content(guest.overlay(), raw)
        assert raw.read_bytes() == now
        if start == 5 * CLUSTER + 512:
            # Half a mebibyte of it was written since and is zeroes again: they take no room.
            assert guest.overlay().stat().st_blocks <= room
        guest.sh("echo 3 > /proc/sys/vm/drop_caches")
        read = guest.sh("dd if=/dev/vdb bs=64k count=32 2>/dev/null | sha256sum").split()[0]
        assert read == hashlib.sha256(now[: 32 * CLUSTER]).hexdigest()
    for tag in ("two", "one"):
        guest.reset_all(tag)
        assert guest.digest() == content(guest.overlay(), raw, tag)


def test_a_range_of_a_disk_that_was_written_to_meanwhile(guest: Guest) -> None:
    guest.take("one")
    write(guest, "now")
    plan = guest.prepare("one", (0, CLUSTER))
    guest.sh(RANDOM.format(size="64k", block=220))
    digest = guest.digest()
    with pytest.raises(RefusedError, match="somebody wrote"):
        guest.restore(plan)
    assert guest.status() == "running"
    assert guest.digest() == digest
    assert guest.back("one", (0, CLUSTER)).running
    assert guest.digest() != digest


def test_a_range_in_a_guest_that_is_paused(guest: Guest) -> None:
    """Whoever cannot let go of the disk is paused around both, and then nothing can come between."""
    guest.sh("dd if=/dev/zero of=/dev/vdb bs=64k seek=160 count=8 conv=fsync 2>/dev/null")
    guest.take("one")
    write(guest, "now")
    with guest.paused():
        swapped = guest.back("one", (160 * CLUSTER, 164 * CLUSTER))
    assert not swapped.running
    assert set(guest.sh("dd if=/dev/vdb bs=64k skip=160 count=4 2>/dev/null | od -An -v -tx1").split()) == {"00"}


# --- the guest's side


def test_what_a_guest_keeps_of_a_disk(guest: Guest) -> None:
    """A guest that holds the device open sees its cache, not the disk: the flush is needed, and helps."""
    guest.sh("echo then | dd of=/dev/vdb bs=64k seek=210 conv=fsync")
    guest.take("one")
    guest.sh("echo now | dd of=/dev/vdb bs=64k seek=210 conv=fsync")
    guest.sh("(sleep 60 < /dev/vdb & echo $! > /run/holder) > /dev/null 2>&1")
    read = "dd if=/dev/vdb bs=64k skip=210 count=1 2>/dev/null | head -n 1"
    assert guest.sh(read) == "now\n"
    guest.back("one")
    assert guest.sh(read) == "now\n"
    guestdisk.regain(guest.call, "/dev/vdb", ())
    assert guest.sh(read) == "then\n"
    guest.sh("kill $(cat /run/holder)")


def test_a_guest_lets_a_disk_go_and_has_it_again(guest: Guest) -> None:
    call = guest.call
    assert guestdisk.device(call, "vdb", "extra") == "/dev/vdb"
    write(guest, "then")
    guest.take("one")
    guest.sh("mount -o noatime /dev/vdb /extra; echo now > /extra/mark")
    mounted = guestdisk.mounted(call)
    assert mounted is not None
    assert {"vda", "vdb"} <= mounted
    mounts = guestdisk.release(call, "/dev/vdb")
    assert [(m.device, m.place, m.kind) for m in mounts] == [("/dev/vdb", "/extra", "ext4")]
    mounted = guestdisk.mounted(call)
    assert mounted is not None
    assert "vda" in mounted
    assert "vdb" not in mounted
    guest.back("one")
    guestdisk.regain(call, "/dev/vdb", mounts)
    assert guest.sh("cat /extra/mark; grep -c noatime /proc/mounts") == "then\n2\n"
    assert "EXT4-fs error" not in guest.sh("dmesg")


def test_a_disk_that_a_guest_does_not_let_go(guest: Guest) -> None:
    guest.sh(
        "mount /dev/vdb /extra; mkdir -p /extra/in; (cd /extra; sleep 60 & echo $! > /run/holder) > /dev/null 2>&1"
    )
    with pytest.raises(GuestError, match="umount failed"):
        guestdisk.release(guest.call, "/dev/vdb")
    guest.sh("kill $(cat /run/holder)")
    # One that another namespace has mounted looks free here, and is not.
    guest.sh(
        "unshare -m sleep 60 > /dev/null 2>&1 & echo $! > /run/holder; until grep -q vdb /proc/$!/mounts; do :; done"
    )
    with pytest.raises(GuestError, match="busy"):
        guestdisk.release(guest.call, "/dev/vdb")
    assert "/extra" in guest.sh("cat /proc/mounts")
    guest.sh("kill $(cat /run/holder)")


def test_a_debian_guest_and_its_partitions(outside: RealOutside) -> None:
    """Partitions that the snapshot has and the disk had no more are there again, and their file system is mounted."""
    image = imagestore.find(Settings(), "debian")
    spec = two_disks(outside.spec())
    folder = images(spec)
    folder.mkdir(mode=0o755, exist_ok=True)
    base = folder / "root.qcow2"
    base.hardlink_to(Path(image.kernel).with_name("root.qcow2"))
    root = replace(spec.disks[0], name="root", backing=str(base), backing_format="qcow2", size=2 << 30)
    memory = 192 * MIB
    boot = {"kernel": image.kernel, "initrd": image.initrd, "cmdline": image.cmdline, "image": "debian"}
    spec = replace(spec, **boot, memory=memory, max_memory=memory, disks=(root, spec.disks[1]))
    try:
        with made(outside, spec, start=True) as uuid:
            guest = Guest(outside, uuid)
            part = "printf 'n\\np\\n1\\n\\n\\nw\\n' | busybox fdisk /dev/vdb; /sbin/mke2fs -q -t ext4 -F /dev/vdb1 4m"
            guest.sh(f"({part}; mkdir -p /extra; mount /dev/vdb1 /extra; echo then > /extra/mark) > /dev/null")
            mounts = guestdisk.release(guest.call, guestdisk.device(guest.call, "vdb", "extra"))
            assert [(m.device, m.place) for m in mounts] == [("/dev/vdb1", "/extra")]
            guest.take("one")
            guest.sh("dd if=/dev/zero of=/dev/vdb bs=64k count=4 conv=fsync; blockdev --rereadpt /dev/vdb")
            guest.sh("test ! -e /dev/vdb1")
            guest.back("one")
            guestdisk.regain(guest.call, "/dev/vdb", mounts)
            assert guest.sh("cat /extra/mark") == "then\n"
            assert guest.status() == "running"
            assert "error" not in guest.sh("dmesg | grep -e EXT4 -e 'I/O' || true")
            diskspare.forget(guest.overlay())
            guest.delete("one")
    finally:
        base.unlink()


# --- many


def test_fifty_swaps_leak_nothing(guest: Guest) -> None:
    write(guest, "then")
    digest = guest.digest()
    guest.take("one")
    guest.back("one")
    before = guest.descriptors(), set(guest.nodes()), guest.files(), guest.devices()
    times = []
    for turn in range(SWAPS):
        if turn % 10 == 0:
            guest.sh(RANDOM.format(size="200k", block=turn * 4))
        times.append(guest.back("one"))
        assert times[-1].running
        assert times[-1].paused == 0
    assert guest.digest() == digest
    assert (guest.descriptors(), set(guest.nodes()), guest.files(), guest.devices()) == before
    assert virsh("domstate", guest.uuid).strip() == "running"
    for name, _ in times[0].stages:
        print(name, sorted(dict(t.stages)[name] for t in times)[SWAPS // 2])
    print("paused", sorted(t.paused for t in times)[SWAPS // 2], "away", sorted(t.away for t in times)[SWAPS // 2])


def test_an_overlay_of_libvirts_and_its_commit(guest: Guest) -> None:
    """What virsh does with disks works after it, and a disk that was put on another node by virsh is one to reset."""
    write(guest, "then")
    digest = guest.digest()
    guest.take("one")
    write(guest, "now")
    guest.back("one")
    over = guest.overlay().with_name("over.qcow2")
    qemuimg.create_overlay(over, guest.overlay(), "qcow2", SIZE)
    os.chown(over, *guest._owner())
    virsh(
        *("snapshot-create-as", guest.uuid, "--disk-only", "--no-metadata", "--reuse-external"),
        *("--diskspec", "vda,snapshot=no", "--diskspec", f"vdb,file={over}"),
    )
    try:
        assert guest.overlay() == over
        guest.take("two")
        guest.sh(RANDOM.format(size="100k", block=10))
        assert guest.digest() != digest
        nodes = guest.nodes()
        guest.back("two")
        assert guest.digest() == digest
        assert _options(guest.nodes()) == _options(nodes)
    finally:
        if "two" in guest.tags:
            guest.delete("two")
        diskspare.forget(over)
        virsh("blockcommit", guest.uuid, "vdb", "--active", "--shallow", "--pivot", "--wait")
        over.unlink()
    assert guest.digest() == digest
