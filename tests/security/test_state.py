"""State that somebody else made, changed or broke: refused or reported in a sentence, and never followed elsewhere."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.command import FakeSite

from hvctl import codec
from hvctl.adapters.disks.storage import FolderStorage
from hvctl.adapters.libvirt.domainxml_read import read
from hvctl.adapters.qemu import qemuimg
from hvctl.adapters.ram import layers, ramfile
from hvctl.adapters.ram.layers import Writer
from hvctl.adapters.ram.pages import PAGE
from hvctl.adapters.snapshots import snapshotfolder
from hvctl.adapters.store.database import Database
from hvctl.engine.lock import vm_lock
from hvctl.errors import HvctlError, RefusedError, UnreachableError
from hvctl.model.allocation import Allocation, Record
from hvctl.model.host import HostFacts
from hvctl.model.operation import Phase
from hvctl.model.snapshot import Binding, Snapshot
from hvctl.model.vm import Accel, DiskSpec, Process, Region, VmSpec
from hvctl.settings import Settings, load_settings

pytestmark = pytest.mark.processes

MIB = 1 << 20
UUID = "6e0a1f0e-5c1b-4b7e-9b52-0d3b3b1f8a01"
ID = "0f3c1c52-4a86-4c5e-9d62-0d3b3b1f8a02"
READING = (("vm", "list"), ("vm", "show", "a"), ("config", "show"), ("image", "list"), ("snapshot", "list", "a"))


@pytest.fixture(params=(0o022, 0o077))
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file of the host that no planted link may lead to."""
    path = tmp_path / "victim"
    path.write_text("the host's own")
    yield path
    assert path.read_text() == "the host's own"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def facts() -> HostFacts:
    return HostFacts("h", "qemu:///system", 1, 1, "", "", "", 2, os.geteuid(), os.getegid())


def settings(root: Path) -> Settings:
    return Settings(state_dir=str(root / "state"), run_dir=str(root / "run"), ram_dir=str(root / "ram"))


def spec(made: Settings) -> VmSpec:
    folder = made.vms_dir / UUID
    disk = DiskSpec("data", "vda", str(folder / "data.qcow2"), MIB)
    return VmSpec(
        uuid=UUID, name="a", image="micro", accel=Accel.TCG, vcpus=1, max_vcpus=1, memory=MIB, max_memory=MIB,
        kernel="/k/kernel", initrd="/k/initrd", cmdline="", folder=str(folder),
        monitor=str(folder / "qmp" / "monitor.sock"), disks=(disk,), nics=(),
    )  # fmt: skip


def snapshot(made: Settings) -> Snapshot:
    return Snapshot(
        id=ID, name="s1", vm_uuid=UUID, created_at="2026-01-01T00:00:00Z",
        binding=Binding(Process(1, 1, "b"), ("cpu",), ("disk vda node1 1048576", "node node1 qcow2 rw /d")),
        tag=f"hvctl-{ID}", targets={"vda": "node1"}, vmstate_node=f"hvctl-{ID[:8]}",
        folder=str(made.snapshots_dir / UUID / ID), regions=(Region("pc.ram", "/ram", 4096),), balloon=MIB, vcpus=1,
        stored=0,
    )  # fmt: skip


def store(folder: Path, taken: Snapshot) -> None:
    """RAM of ones."""
    page = np.ones(PAGE, np.uint8)
    writer = Writer(folder, taken.ram_size // PAGE, base=False, limit=MIB)
    writer.put(np.array([0]), np.array([page.ctypes.data]))
    writer.finish()
    writer.close()


def publish(made: Settings, taken: Snapshot) -> Path:
    folder = snapshotfolder.folder_of(made.snapshots_dir, taken)
    snapshotfolder.make(made.snapshots_dir, folder)
    store(folder, taken)
    qemuimg.create_empty(folder / snapshotfolder.VMSTATE, MIB)
    snapshotfolder.publish(folder, taken)
    return folder


def listed(made: Settings) -> list[Snapshot]:
    return list(snapshotfolder.published(made.snapshots_dir, UUID))


def modes(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): stat.S_IMODE(p.lstat().st_mode) for p in root.rglob("*") if not p.is_symlink()}


# --- T3: modes


def test_t03_what_adapters_write_is_closed_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    made = settings(tmp_path)
    FolderStorage(made, facts()).make_disks(spec(made))
    publish(made, snapshot(made))
    with vm_lock(made.locks_dir, UUID, 0.0) as lock:
        lock.mark(1, Phase.BEGUN)
    Database(made.database).create_file()
    vm, taken = f"state/vms/{UUID}", f"ram/snapshots/{UUID}/{ID}"
    found = modes(tmp_path)
    folders = {n: m for n, m in found.items() if (tmp_path / n).is_dir()}
    assert {n: m for n, m in found.items() if n not in folders} == {
        f"{vm}/data.qcow2": 0o600,
        f"{taken}/ram": 0o600,
        f"{taken}/index": 0o600,
        f"{taken}/vmstate.qcow2": 0o600,
        f"{taken}/manifest.json": 0o600,
        f"run/locks/{UUID}.lock": 0o600,
        "state/hvctl.db": 0o600,
    }
    assert folders[f"{vm}/qmp"] == folders["run/locks"] == 0o700
    # QEMU's user passes through these, or no VM starts and no snapshot is taken; nobody lists or writes.
    for name in ("state/vms", vm, "ram", "ram/snapshots", f"ram/snapshots/{UUID}", taken):
        assert folders[name] == 0o711, name
    assert folders["state"] & 0o033 == 0o011


def test_t03_no_core_file_and_closed_files_from_the_command(umask: int, tmp_path: Path) -> None:
    site = FakeSite(tmp_path / "state")
    site.folder.mkdir(mode=0o700)
    site.world.add_vm("a")
    assert site.run("vm", "protect", "a").returncode == 0
    found = modes(site.folder)
    assert {m & 0o077 for n, m in found.items() if n.startswith(("hvctl.db", "run"))} == {0}


def test_t03_a_snapshot_is_wiped_when_it_is_removed(tmp_path: Path) -> None:
    made = settings(tmp_path)
    folder = publish(made, snapshot(made))
    held = os.open(folder / "ram", os.O_RDWR)
    os.pwrite(held, b"canary", 0)
    snapshotfolder.remove(folder)
    assert (os.pread(held, 6, 0), folder.exists()) == (b"", False)  # even who has it open still finds nothing
    os.close(held)


# --- T4: planted links


def test_t04_no_link_is_followed_where_a_snapshot_writes(tmp_path: Path, victim: Path) -> None:
    made, taken = settings(tmp_path), snapshot(settings(tmp_path))
    folder = publish(made, taken)
    for name in (layers.RAM, layers.INDEX, snapshotfolder.VMSTATE):
        (folder / name).unlink()
        (folder / name).symlink_to(victim)
        assert listed(made) == []
        with pytest.raises(OSError):
            ramfile.wipe(folder / name)
        with pytest.raises((HvctlError, OSError)):
            if name == snapshotfolder.VMSTATE:
                qemuimg.create_empty(folder / name, MIB)
            else:
                store(folder, taken)
        with pytest.raises(RefusedError):
            layers.Layer(folder, 1)
    (folder / snapshotfolder.MANIFEST).unlink()
    (folder / snapshotfolder.MANIFEST).symlink_to(victim)
    assert listed(made) == []
    snapshotfolder.publish(folder, taken)
    assert not (folder / snapshotfolder.MANIFEST).is_symlink()


@pytest.mark.parametrize("depth", range(4))
def test_t04_no_folder_of_a_snapshot_may_be_a_link_or_somebody_elses(depth: int, tmp_path: Path) -> None:
    made, taken = settings(tmp_path), snapshot(settings(tmp_path))
    folder = publish(made, taken)
    step = [folder, folder.parent, made.snapshots_dir, Path(made.ram_dir)][depth]
    step.chmod(0o777)
    assert listed(made) == []
    step.chmod(0o711)
    assert len(listed(made)) == 1
    moved = step.rename(tmp_path / "moved")
    step.symlink_to(moved)
    assert listed(made) == []
    with pytest.raises(RefusedError, match="only"):
        snapshotfolder.make(made.snapshots_dir, folder)


def test_t04_locks_disks_and_the_database_follow_no_link(tmp_path: Path, victim: Path) -> None:
    made = settings(tmp_path)
    made.locks_dir.mkdir(parents=True)
    (made.locks_dir / f"{UUID}.lock").symlink_to(victim)
    with pytest.raises(UnreachableError), vm_lock(made.locks_dir, UUID, 0.0):
        pass
    storage = FolderStorage(made, facts())
    storage.make_disks(spec(made))
    disk = Path(spec(made).disks[0].path)
    disk.unlink()
    disk.symlink_to(victim)
    with pytest.raises(RefusedError):
        storage.make_disks(spec(made))
    disk.unlink()
    disk.with_name(f".{disk.name}.partial").symlink_to(victim)
    storage.make_disks(spec(made))
    assert qemuimg.info(disk, "qcow2")["virtual-size"] == MIB
    storage.remove(UUID)


@pytest.mark.parametrize("name", ["..", ".", "", "../x", "a/b", UUID.upper(), UUID + "/..", "\0", "*", UUID + "\n"])
def test_t10_no_id_leads_out_of_its_folder(name: str, tmp_path: Path) -> None:
    made = settings(tmp_path)
    (tmp_path / "x").mkdir()
    with pytest.raises(RefusedError):
        FolderStorage(made, facts()).remove(name)
    for part in ({"id": name}, {"vm_uuid": name}):
        taken = replace(snapshot(made), **part)  # type: ignore[arg-type]
        taken = replace(taken, folder=str(made.snapshots_dir / taken.vm_uuid / taken.id))
        if name != UUID.upper():  # an id of a snapshot may have capitals
            with pytest.raises(RefusedError):
                snapshotfolder.folder_of(made.snapshots_dir, taken)
    assert (tmp_path / "x").exists()


# --- T28: manifests


@pytest.mark.parametrize(
    "change",
    [
        {"tag": "other"}, {"targets": {}}, {"targets": {"vda": "node1", "vdb": "node1"}}, {"targets": {"vda": "node2"}},
        {"vmstate_node": "node1"}, {"regions": [{"name": "pc.ram", "path": "/ram", "size": 8192}]},
        {"regions": [{"name": "pc.ram", "path": "/ram", "size": -1}]}, {"regions": []}, {"folder": "/etc"},
        {"id": "../.."}, {"vm_uuid": ID}, {"binding": {}}, {"binding": "x"}, {"targets": {"a": 1}}, {"vcpus": "many"},
        {"targets": ["node1"]}, {"owned": "all"},
    ],
)  # fmt: skip
def test_t28_a_changed_manifest_is_no_snapshot(change: dict[str, Any], tmp_path: Path) -> None:
    made = settings(tmp_path)
    folder = publish(made, snapshot(made))
    assert listed(made) == [snapshot(made)]
    document = {**codec.dump(snapshot(made)), **change}
    (folder / snapshotfolder.MANIFEST).write_text(json.dumps(document))
    assert listed(made) == []


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "\0", '"' * 9, "[" * 100_000, "\udcff"])
def test_t28_a_manifest_that_is_none_is_no_snapshot(text: str, tmp_path: Path) -> None:
    made = settings(tmp_path)
    folder = publish(made, snapshot(made))
    (folder / snapshotfolder.MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    assert listed(made) == []


@pytest.mark.parametrize("name", [layers.RAM, layers.INDEX, snapshotfolder.VMSTATE])
def test_t28_a_snapshot_without_its_files_is_none(name: str, tmp_path: Path) -> None:
    made = settings(tmp_path)
    folder = publish(made, snapshot(made))
    if name != snapshotfolder.VMSTATE:
        os.truncate(folder / name, 3)
        assert listed(made) == [] or name == layers.RAM
        # Of its pages the index tells, which is read before a guest is paused for them.
        with pytest.raises(RefusedError, match="damaged"):
            layers.Layer(folder, 1)
    (folder / name).unlink()
    assert listed(made) == []


# --- the record in a domain's metadata


@pytest.mark.parametrize(
    "record",
    [
        "", "x", "[]", "null", "{}", '{"allocation": 5}', '{"allocation": {"vcpus": "x", "memory": 1}}',
        '{"allocation": {"vcpus": -5, "memory": -99999999999999999999}}',
        '{"allocation": {"vcpus": 1, "memory": -1}}', '{"allocation": {"vcpus": 1, "memory": 1, "cpu_quota": -100}}',
        '{"allocation": {"vcpus": 1, "memory": 1, "nics": [{"mac": "m", "inbound": -1}]}}',
        '{"allocation": {"vcpus": 1, "memory": 1e400}}', '{"allocation": {"vcpus": 99999, "memory": 1}}',
        '{"allocation": {"vcpus": 1, "memory": 1, "disks": [{"target": "vda", "iops": 99999999999999999999}]}}',
        '{"allocation": {"vcpus": 1, "memory": 1}, "labels": {"a": ["b"]}}', "[" * 200_000, "z" * 2_000_000,
    ],
    ids=range(17),
)  # fmt: skip
def test_t09_a_record_edited_to_nonsense_counts_as_none(record: str) -> None:
    xml = (
        f"<domain type='qemu'><name>x</name><uuid>{UUID}</uuid><memory unit='KiB'>1024</memory><vcpu>1</vcpu>"
        f"<metadata><h:vm xmlns:h='urn:hvctl:vm:1'>{record}</h:vm></metadata></domain>"
    )
    assert read(xml).record is None


def test_t09_a_sound_record_is_read() -> None:
    record = Record(Allocation(2, MIB, 150, 100), labels={"k": "v"})
    text = json.dumps(codec.dump(record))
    xml = f"<domain><metadata><h:vm xmlns:h='urn:hvctl:vm:1'>{text}</h:vm></metadata></domain>"
    assert read(xml).record == record


# --- the database


@pytest.mark.parametrize(
    "kind", ["garbage", "empty", "folder", "newer", "tables gone", "link to nowhere", "unreadable"]
)
def test_t24_with_a_broken_database_reading_goes_on_and_the_rest_says_why(kind: str, tmp_path: Path) -> None:
    site = FakeSite(tmp_path)
    site.world.add_vm("a")
    assert site.run("vm", "protect", "a").returncode == 0
    path = tmp_path / "hvctl.db"
    match kind:
        case "garbage":
            path.write_bytes(os.urandom(8192))
        case "empty":
            path.write_bytes(b"")
        case "folder":
            path.unlink()
            path.mkdir()
        case "newer":
            with closing(sqlite3.connect(path)) as database, database:
                database.execute("UPDATE alembic_version SET version_num = '9999'")
        case "tables gone":
            with closing(sqlite3.connect(path)) as database, database:
                database.execute("DROP TABLE operation_step")
        case "link to nowhere":
            path.unlink()
            path.symlink_to(tmp_path / "no" / "where")
        case "unreadable":
            path.write_bytes(path.read_bytes()[:5000])
    for words in READING:
        done = site.run(*words)
        assert (done.returncode, done.stderr) == (0, ""), (words, done.stderr)
    for words in (
        ("operation", "show", "1"),
        ("recover",),
        ("vm", "protect", "a", "--off"),
        ("doctor", "--probe", "drift"),
    ):
        done = site.run(*words)
        said = done.stdout + done.stderr
        assert "Traceback" not in said, (words, said)
        if kind != "empty" and not (kind == "tables gone" and words[0] in ("recover", "doctor")):
            assert done.returncode != 0, (words, said)
            assert "database" in said, (words, said)


# --- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LOCK_WAIT", "nan"), ("LOCK_WAIT", "inf"), ("LOCK_WAIT", "-1"), ("LOCK_WAIT", "x"), ("LOCK_WAIT", ""),
        ("LIBVIRT_DEADLINE", "inf"), ("LIBVIRT_DEADLINE", "1e300"), ("CPU_OVERCOMMIT", "nan"),
        ("MEMORY_OVERCOMMIT", "-1"), ("RESERVE_CPUS", "-1"), ("RESERVE_CPUS", "9" * 30), ("RESERVE_CPUS", "9" * 5000),
        ("RESERVE_MEMORY", "1"), ("MEMORY_MARGIN", "-1MiB"), ("STATE_DIR", ""), ("STATE_DIR", "relative"),
        ("RUN_DIR", "../x"), ("RAM_DIR", "/a\x1b[2J"), ("STATE_DIR", "/a\nb"), ("NETWORK_CAPACITY", "fast"),
        ("DATABASE_URL", "nonsense"), ("DATABASE_URL", "sqlite://"), ("URI", "qemu+tcp://x/system"), ("URI", ""),
        ("FAULT", "x"),
    ],
)  # fmt: skip
def test_t26_a_nonsense_setting_is_a_sentence(name: str, value: str, tmp_path: Path, monkeypatch: Any) -> None:
    site = FakeSite(tmp_path)
    site.world.add_vm("a")
    variables = {**site.environment, f"HVCTL_{name}": value}
    monkeypatch.setattr(FakeSite, "environment", property(lambda _: variables))
    done = site.run("vm", "protect", "a", fault=value if name == "FAULT" else "")
    assert done.returncode not in (0, 1), done.stderr
    assert done.stderr.startswith("hvctl: "), done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"state_dir = '\\u0000'", b'state_dir = "a\\u0000"', b"x" * 10_000_000]
)
def test_t26_a_nonsense_configuration_file_is_a_usage_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "hvctl").mkdir()
    (tmp_path / "hvctl" / "config.toml").write_bytes(content)
    with pytest.raises(HvctlError, match=r"config\.toml"):
        load_settings({}, {"XDG_CONFIG_HOME": str(tmp_path)})
