"""What a guest says of its disks, and what it is asked to do with them: a guest may say anything."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest

from hvctl.adapters.guest import guestdisk
from hvctl.adapters.guest.guestdisk import Mount
from hvctl.errors import GuestError


def says(answer: Any) -> Callable[[str, dict[str, Any], float], Any]:
    return lambda command, arguments, seconds: answer


def system(*disks: dict[str, Any]) -> dict[str, Any]:
    return {"name": "x", "mountpoint": "/", "disk": list(disks)}


PCI = {"domain": 0, "bus": 0, "slot": 4, "function": 0}


def test_the_words_for_disks_in_use() -> None:
    answer = [system({"dev": "/dev/vda", "pci-controller": PCI}), system({"dev": "/dev/vdb1", "serial": "extra"})]
    assert guestdisk.mounted(says(answer)) == {"vda", "0000:00:04.0", "vdb1", "extra"}
    assert guestdisk.mounted(says([])) == frozenset()


@pytest.mark.parametrize(
    "disk",
    [
        {},
        {"dev": "/dev/../etc"},
        {"dev": 7, "serial": "", "pci-controller": {**PCI, "slot": -1}},
        {"pci-controller": {"slot": 4}},
        {"serial": "x" * 300},
    ],
)
def test_a_file_system_on_nobody_knows_what_is_unknown(disk: dict[str, Any]) -> None:
    assert guestdisk.mounted(says([system({"dev": "/dev/vda"}), system(disk)])) is None
    assert guestdisk.mounted(says([system()])) is None


@pytest.mark.parametrize("answer", [None, {}, "x", [1], [{}], [{"disk": 1}], [{"disk": ["x"]}], [system()] * 300])
def test_another_shape_is_an_error(answer: Any) -> None:
    with pytest.raises(GuestError, match="guest-get-fsinfo"):
        guestdisk.mounted(says(answer))


def test_the_disks_that_a_guest_runs_from() -> None:
    data = system({"dev": "/dev/vdb"}) | {"mountpoint": "/data"}
    usr = system({"serial": "programs"}, {"dev": 7}) | {"mountpoint": "/usr"}
    answer = [system({"dev": "/dev/vda1", "pci-controller": PCI}), data, usr]
    assert guestdisk.system(says(answer)) == {"vda1", "0000:00:04.0", "programs"}


@pytest.mark.parametrize("answer", [None, {}, "x", [1], [{}], [{"mountpoint": "/", "disk": 1}], [system()] * 300])
def test_what_a_guest_does_not_tell_it_does_not_run_from(answer: Any) -> None:
    assert guestdisk.system(says(answer)) == frozenset()


def test_how_full_a_disk_is_in_the_guests_words() -> None:
    one = system({"dev": "/dev/vda"}) | {"used-bytes": 30, "total-bytes": 40}
    two = system({"dev": "/dev/vda"}, {"dev": "/dev/vdb"}) | {"used-bytes": 1, "total-bytes": 2}
    assert guestdisk.used(says([one, two, system({"dev": "/dev/vdc"})])) == [(frozenset({"vda"}), 0.75)]


@pytest.mark.parametrize(
    "figures",
    [
        {"used-bytes": 2, "total-bytes": 1},
        {"used-bytes": -1, "total-bytes": 1},
        {"used-bytes": True, "total-bytes": 1},
        {"used-bytes": 0, "total-bytes": 0},
        {"used-bytes": "1", "total-bytes": 2},
        {"used-bytes": 1, "total-bytes": 2**70},
    ],
)
def test_figures_that_make_no_sense_are_none(figures: dict[str, Any]) -> None:
    assert guestdisk.used(says([system({"dev": "/dev/vda"}) | figures, 1, {}, {"disk": "x"}])) == []
    with pytest.raises(GuestError, match="guest-get-fsinfo"):
        guestdisk.used(says("x"))


class Guest:
    """An agent whose programs answer from a table, and that notes what was run."""

    def __init__(self, **outputs: str) -> None:
        self.outputs = outputs
        self.ran: list[list[str]] = []
        self.fails: set[str] = set()

    def __call__(self, command: str, arguments: dict[str, Any], seconds: float) -> Any:
        if command == "guest-exec":
            self.ran.append([arguments["path"], *arguments["arg"]])
            return {"pid": 1}
        name = self.ran[-1][0].rpartition("/")[2]
        failed = " ".join(self.ran[-1]) in self.fails
        output = base64.b64encode(self.outputs.get(name, "").encode()).decode()
        return {
            "exited": True,
            "exitcode": int(failed),
            "out-data": output,
            "err-data": base64.b64encode(b"no").decode(),
        }


MOUNTS = """rootfs / rootfs rw 0 0
/dev/vda /data ext4 rw,noatime 0 0
/dev/vdb /extra ext4 rw 0 0
/dev/vdb1 /a\\040b xfs rw,discard 0 0
/dev/vdbc /c ext4 rw 0 0
/dev/vdb /extra/../x ext4 rw
short
"""


def test_what_is_mounted_from_a_disk_and_its_partitions() -> None:
    guest = Guest(cat=MOUNTS)
    gone = guestdisk.release(guest, "/dev/vdb")
    assert gone == (
        Mount("/dev/vdb", "/extra", "ext4", "rw"),
        Mount("/dev/vdb1", "/a b", "xfs", "rw,discard"),
        Mount("/dev/vdb", "/extra/../x", "ext4", "rw"),
    )
    assert [r for r in guest.ran if r[0] == "/bin/umount"] == [
        ["/bin/umount", "/extra/../x"],
        ["/bin/umount", "/a b"],
        ["/bin/umount", "/extra"],
    ]
    guest.ran.clear()
    guestdisk.regain(guest, "/dev/vdb", gone)
    assert guest.ran[:2] == [["/sbin/blockdev", f"--{what}", "/dev/vdb"] for what in ("flushbufs", "rereadpt")]
    assert guest.ran[2:] == [["/bin/mount", "-t", m.kind, "-o", m.options, m.device, m.place] for m in gone]


@pytest.mark.parametrize("fails", ["/bin/umount /a b", "/sbin/blockdev --rereadpt /dev/vdb"])
def test_what_was_unmounted_is_mounted_again_when_the_rest_fails(fails: str) -> None:
    guest = Guest(cat=MOUNTS)
    guest.fails.add(fails)
    with pytest.raises(GuestError, match="failed: no"):
        guestdisk.release(guest, "/dev/vdb")
    unmounted = {r[1] for r in guest.ran if r[0] == "/bin/umount" and " ".join(r) != fails}
    assert {r[-1] for r in guest.ran if r[0] == "/bin/mount"} == unmounted != set()


@pytest.mark.parametrize("device", ["/dev/../sda", "vdb", "/dev/vdb;reboot", "/dev/-x", "/dev/"])
def test_a_device_is_a_device(device: str) -> None:
    guest = Guest(cat=MOUNTS)
    with pytest.raises(GuestError, match="names a disk that is not one"):
        guestdisk.release(guest, device)


@pytest.mark.parametrize(
    ("blocks", "target", "serial", "found"),
    [
        ("vda root\nvdb extra\n", "vdb", "extra", "vdb"),
        ("vda extra\nvdb root\n", "vdb", "extra", "vda"),
        ("vda \nvdb \n", "vdb", None, "vdb"),
        ("vda 01234567890123456789\n", "vdb", "0123456789012345678901", "vda"),
        ("vda root\nvdb other\n", "vdb", "extra", None),
        ("vda extra\nvdb extra\n", "vdb", "extra", None),
        ("vda root\n", "vdb", None, None),
        ("../x extra\n", "vdb", "extra", None),
    ],
)
def test_the_guests_name_of_a_disk(blocks: str, target: str, serial: str | None, found: str | None) -> None:
    guest = Guest(sh=blocks)
    if found is None:
        with pytest.raises(GuestError, match=f"surely {target}"):
            guestdisk.device(guest, target, serial)
    else:
        assert guestdisk.device(guest, target, serial) == f"/dev/{found}"
