"""Every probe of `hvctl doctor` sees what is wrong, says what is lost, and is not hidden by another one."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hvctl.adapters import probes
from hvctl.adapters.node import hostprep, kvmprobe
from hvctl.adapters.node.hostpaths import HostPaths
from hvctl.adapters.probes import (
    Probe,
    cgroups,
    database,
    dirtypages,
    hypervisor,
    kvm,
    monitors,
    permissions,
    pressure,
    ramdir,
    trackers,
    traffic,
)
from hvctl.adapters.store.store import Store
from hvctl.errors import NotFoundError, UnreachableError
from hvctl.model.allocation import Allocation
from hvctl.model.finding import Finding, Health, ok
from hvctl.model.host import HostFacts
from hvctl.model.image import Image
from hvctl.model.vm import Accel, State, Vm
from hvctl.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(state_dir=f"{tmp_path}/state", run_dir=f"{tmp_path}/run", ram_dir=f"{tmp_path}/ram")


@pytest.fixture
def paths(tmp_path: Path) -> HostPaths:
    (tmp_path / "qemu.conf").write_text("")
    return HostPaths(qemu_conf=tmp_path / "qemu.conf", cgroup=tmp_path / "cgroup")


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def wrong(finding: Finding, status: Health) -> str:
    """The detail of a finding that is as bad as it should be and complete for the person who reads it."""
    assert finding.status is status, finding
    assert finding.lost
    assert finding.remedy
    return finding.detail


# --- all together


def test_a_hanging_probe_and_a_broken_one_hide_none_of_the_others(settings: Settings, paths: HostPaths) -> None:
    over = threading.Event()

    def hang(_: Settings, __: HostPaths) -> Finding:
        over.wait(60)
        return ok("hang", "late")

    def broken(_: Settings, __: HostPaths) -> Finding:
        raise ZeroDivisionError("oops")

    def refused(_: Settings, __: HostPaths) -> Finding:
        raise UnreachableError("nobody is there.", "knock")

    table = {
        "hang": Probe(hang, 0.05),
        "broken": Probe(broken),
        "refused": Probe(refused),
        "fine": Probe(lambda _, __: ok("fine", "all is well")),
    }
    try:
        found = probes.examine(settings, (), paths, table)
    finally:
        over.set()
    assert [f.name for f in found] == ["hang", "broken", "refused", "fine"]
    assert [f.status for f in found] == [Health.FAILING, Health.FAILING, Health.FAILING, Health.OK]
    assert found[0].detail == "no answer within 0.05 s"
    assert "ZeroDivisionError: oops" in found[1].detail
    assert (found[2].detail, found[2].remedy) == ("nobody is there", "knock")


def test_only_the_probes_asked_for_run(settings: Settings, paths: HostPaths) -> None:
    table = {n: Probe(lambda _, __, n=n: ok(n, "")) for n in ("a", "b", "c")}  # type: ignore[misc]
    assert [f.name for f in probes.examine(settings, ("c", "a"), paths, table)] == ["c", "a"]
    with pytest.raises(NotFoundError, match="'d'") as error:
        probes.examine(settings, ("d",), paths, table)
    assert error.value.hint == "there are: a, b, c"


# --- libvirt and QEMU


def test_libvirt_that_does_not_answer_fails_with_libvirts_own_remedy(settings: Settings) -> None:
    def nobody(_: Settings) -> None:
        raise UnreachableError("libvirt does not answer.", "hvctl host prepare --yes")

    found = hypervisor.libvirt(settings, nobody)  # type: ignore[arg-type]
    assert wrong(found, Health.FAILING) == "libvirt does not answer"
    assert found.fixable


def test_a_libvirt_that_does_not_know_its_qemu_is_degraded(settings: Settings) -> None:
    facts = HostFacts("h", "qemu:///system", 1, 1, "7.2.22", "9.0.0", "b", 1, 1, 1)
    assert hypervisor.libvirt(settings, lambda _: facts).status is Health.OK
    unknown = replace(facts, hypervisor_version="unknown")
    assert "9.0.0" in wrong(hypervisor.libvirt(settings, lambda _: unknown), Health.DEGRADED)


def qmp_script(path: Path, commands: set[str], capability: str) -> str:
    answers = (
        {"QMP": {}},
        {"return": {}},
        {"return": {"qemu": {"major": 5, "minor": 2, "micro": 1}}},
        {"return": [{"name": c} for c in commands]},
        {"event": "SHUTDOWN"},
        {"return": [{"capability": capability}]},
        {"return": {}},
    )
    return script(path, "\n".join(["cat >/dev/null", *(f"echo '{json.dumps(a)}'" for a in answers)]))


def test_a_qemu_without_snapshot_load_is_named(tmp_path: Path) -> None:
    binary = qmp_script(tmp_path / "q", set(hypervisor.COMMANDS) - {"snapshot-load"}, hypervisor.CAPABILITY)
    assert wrong(hypervisor.qemu(HostPaths(qemu=binary)), Health.DEGRADED) == "QEMU 5.2.1 does not know snapshot-load"
    binary = qmp_script(tmp_path / "q", set(hypervisor.COMMANDS), "other")
    assert "x-ignore-shared" in wrong(hypervisor.qemu(HostPaths(qemu=binary)), Health.DEGRADED)
    binary = qmp_script(tmp_path / "q", set(hypervisor.COMMANDS), hypervisor.CAPABILITY)
    assert hypervisor.qemu(HostPaths(qemu=binary)).status is Health.OK


@pytest.mark.parametrize("body", ["exit 1", "echo nonsense", "echo '{\"return\": {}}'"])
def test_a_qemu_that_talks_nonsense_fails(tmp_path: Path, body: str) -> None:
    wrong(hypervisor.qemu(HostPaths(qemu=script(tmp_path / "q", body))), Health.FAILING)


def test_a_qemu_that_is_not_there_fails(tmp_path: Path) -> None:
    assert "not installed" in wrong(hypervisor.qemu(HostPaths(qemu=str(tmp_path / "none"))), Health.FAILING)


# --- KVM


@pytest.fixture
def image(settings: Settings) -> Image:
    Path(settings.state_dir).mkdir()
    return Image("micro", "d1", "kernel", "initrd", "quiet", None, None, None, 0, "", 0)


VERSION = '[ "$1" = --version ] && { echo "QEMU emulator version 9.9.9"; exit; }\n'


def test_kvm_works_when_a_guest_is_ready_and_the_answer_is_kept(
    settings: Settings, image: Image, tmp_path: Path
) -> None:
    qemu = HostPaths(qemu=script(tmp_path / "q", VERSION + "printf 'hvctl-'; printf 'ready\\n'; exec cat"))
    works, reason = kvmprobe.kvm_boots(settings, image, qemu)
    assert works
    assert "booted under KVM" in reason
    assert stat.S_IMODE(kvmprobe.answer_file(settings).stat().st_mode) == 0o600
    script(tmp_path / "q", VERSION + "exit 1")
    assert kvmprobe.kvm_boots(settings, image, qemu) == (True, reason)


@pytest.mark.parametrize("change", ["image", "qemu", "boot", "file"])
def test_the_kept_answer_ends_with_what_it_depends_on(
    settings: Settings, image: Image, tmp_path: Path, change: str
) -> None:
    proc = tmp_path / "proc/sys/kernel/random"
    proc.mkdir(parents=True)
    (proc / "boot_id").write_text("one")
    qemu = HostPaths(qemu=script(tmp_path / "q", VERSION + "echo hvctl-ready; exec cat"), proc=tmp_path / "proc")
    assert kvmprobe.kvm_boots(settings, image, qemu)[0]
    script(tmp_path / "q", VERSION + "echo no kvm here >&2; exit 1")
    if change == "image":
        image = replace(image, digest="d2")
    elif change == "qemu":
        script(tmp_path / "q", VERSION.replace("9.9.9", "10.0.0") + "echo no kvm here >&2; exit 1")
    elif change == "boot":
        (proc / "boot_id").write_text("two")
    else:
        kvmprobe.answer_file(settings).write_text('{"works": true}')
    assert kvmprobe.kvm_boots(settings, image, qemu) == (False, "QEMU ends under KVM: no kvm here")


def test_a_guest_that_hangs_under_kvm_is_ended_and_means_no(settings: Settings, image: Image, tmp_path: Path) -> None:
    body = f"echo $$ > {tmp_path}/pid; echo Linux version 6.1; exec sleep 60"
    qemu = HostPaths(qemu=script(tmp_path / "q", VERSION + body))
    works, reason = kvmprobe.kvm_boots(settings, image, qemu, seconds=1.0)
    assert not works
    assert reason == "a guest under KVM was not ready within 1 s: its kernel started and got stuck"
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_without_a_micro_image_kvm_is_unknown(settings: Settings, paths: HostPaths) -> None:
    found = kvm.probe(settings, paths)
    assert wrong(found, Health.DEGRADED).startswith("unknown")
    assert "hvctl image build micro" in (found.remedy or "")


# --- RAM directory


@pytest.fixture
def tmpfs() -> Iterator[Settings]:
    # pytest's own folder is on a disk, or closed to QEMU's user.
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="hvctl-test-") as name:
        Path(name).chmod(0o711)
        found = Settings(ram_dir=name)
        found.guests_ram_dir.mkdir(mode=0o711)
        yield found


def test_the_ram_directory_is_ok_on_tmpfs_when_libvirt_uses_it(tmpfs: Settings, paths: HostPaths) -> None:
    paths.qemu_conf.write_text(f'memory_backing_dir = "{tmpfs.guests_ram_dir}"\n')
    assert ramdir.probe(tmpfs, paths).status is Health.OK
    assert list(tmpfs.guests_ram_dir.iterdir()) == []


def test_a_ram_directory_that_libvirt_does_not_use_is_degraded(tmpfs: Settings, paths: HostPaths) -> None:
    assert "its default folder" in wrong(ramdir.probe(tmpfs, paths), Health.DEGRADED)
    paths.qemu_conf.write_text('memory_backing_dir = "/var/lib/ram"\n')
    assert "/var/lib/ram" in wrong(ramdir.probe(tmpfs, paths), Health.DEGRADED)


def test_a_ram_directory_that_qemu_cannot_reach_fails(tmpfs: Settings, paths: HostPaths) -> None:
    Path(tmpfs.ram_dir).chmod(0o700)
    assert tmpfs.ram_dir in wrong(ramdir.probe(tmpfs, paths), Health.FAILING)


def test_a_ram_directory_that_is_missing_a_file_or_on_a_disk_fails(
    tmpfs: Settings, settings: Settings, paths: HostPaths, tmp_path: Path
) -> None:
    tmpfs.guests_ram_dir.rmdir()
    assert "not a folder" in wrong(ramdir.probe(tmpfs, paths), Health.FAILING)
    tmpfs.guests_ram_dir.touch()
    assert "not a folder" in wrong(ramdir.probe(tmpfs, paths), Health.FAILING)
    settings.guests_ram_dir.mkdir(parents=True)
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text("1 0 8:1 / / rw - ext4 /dev/sda1 rw\n")
    found = ramdir.probe(settings, replace(paths, proc=tmp_path))
    assert "is on ext4" in wrong(found, Health.FAILING)


def test_the_file_system_is_that_of_the_last_and_longest_mount(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "2 1 0:1 / /a\\040b rw shared:1 - tmpfs tmpfs rw\n"
        "3 1 0:2 / /twice rw - tmpfs tmpfs rw\n"
        "4 1 0:3 / /twice rw - xfs /dev/sdb rw\n"
    )
    kinds = {p: ramdir.filesystem(Path(p), HostPaths(proc=tmp_path)) for p in ("/a b/c", "/a bc", "/twice/x", "/q")}
    assert kinds == {"/a b/c": "tmpfs", "/a bc": "ext4", "/twice/x": "xfs", "/q": "ext4"}


# --- QMP monitors


@pytest.fixture
def vm(tmp_path: Path) -> Vm:
    (tmp_path / "qmp").mkdir(mode=0o700)
    return Vm(
        "u", "web", State.RUNNING, "", Accel.TCG, True, None, Allocation(1, 1), 1, 1, (), (), None,
        monitor=str(tmp_path / "qmp/m.sock"),
    )  # fmt: skip


@pytest.fixture
def listener(vm: Vm) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(vm.monitor or "")
        server.listen()
        yield server


def greet(server: socket.socket) -> threading.Thread:
    def serve() -> None:
        client, _ = server.accept()
        with client:
            client.sendall(b'{"QMP": {"version": {}}}\r\n')

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_a_monitor_that_greets_is_ok(settings: Settings, vm: Vm, listener: socket.socket) -> None:
    thread = greet(listener)
    assert monitors.probe(settings, lambda _: [vm]).status is Health.OK
    thread.join()


def test_a_silent_monitor_is_degraded(
    settings: Settings, vm: Vm, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitors, "GREETING_SECONDS", 0.05)
    assert "web" in wrong(monitors.probe(settings, lambda _: [vm]), Health.DEGRADED)


def test_a_monitor_that_others_reach_or_that_is_gone_fails(settings: Settings, vm: Vm, tmp_path: Path) -> None:
    wrong(monitors.probe(settings, lambda _: [vm]), Health.FAILING)
    (tmp_path / "qmp/m.sock").touch()
    assert "not a socket" in wrong(monitors.probe(settings, lambda _: [vm]), Health.FAILING)
    (tmp_path / "qmp/m.sock").unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(vm.monitor or "")
        (tmp_path / "qmp/m.sock").chmod(0o777)
        (tmp_path / "qmp").chmod(0o711)
        assert "0777" in wrong(monitors.probe(settings, lambda _: [vm]), Health.FAILING)


def test_vms_without_a_monitor_or_not_running_have_none_to_check(settings: Settings, vm: Vm) -> None:
    off, foreign = replace(vm, state=State.OFF), replace(vm, monitor=None)
    assert monitors.probe(settings, lambda _: [off, foreign]).status is Health.OK


# --- cgroups


def test_no_cpu_controller_fails(paths: HostPaths) -> None:
    assert "no cpu controller" in wrong(cgroups.probe(paths), Health.FAILING)


def test_a_v1_controller_whose_groups_have_no_quota_fails(paths: HostPaths) -> None:
    (paths.cgroup / "cpu").mkdir(parents=True)
    (paths.cgroup / "cpu/cpu.shares").touch()
    assert "cpu.cfs_quota_us" in wrong(cgroups.probe(paths), Health.FAILING)
    assert [p.name for p in (paths.cgroup / "cpu").iterdir()] == ["cpu.shares"]


def test_v2_without_the_cpu_controller_fails_and_unused_is_ok(paths: HostPaths) -> None:
    paths.cgroup.mkdir()
    (paths.cgroup / "cgroup.controllers").write_text("memory pids\n")
    (paths.cgroup / "cgroup.subtree_control").write_text("")
    assert "memory, pids" in wrong(cgroups.probe(paths), Health.FAILING)
    (paths.cgroup / "cgroup.controllers").write_text("cpu memory\n")
    assert cgroups.probe(paths).status is Health.OK
    (paths.cgroup / "cgroup.subtree_control").write_text("cpu memory\n")
    assert "cpu.max" in wrong(cgroups.probe(paths), Health.FAILING)


def test_a_group_that_does_not_keep_a_limit_is_seen(tmp_path: Path) -> None:
    for name in cgroups.V2:
        (tmp_path / name).touch()
    assert cgroups.unmet(tmp_path, cgroups.V2) is None
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu.max").symlink_to("/dev/null")
    assert cgroups.unmet(tmp_path, cgroups.V2) == "cpu.max reads  after 50000 100000 was written"


# --- traffic control


def test_without_the_tools_traffic_control_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "unshare" in wrong(traffic.probe(), Health.FAILING)


# --- dirty pages


class Oracle:
    """Reads all of the child's memory and compares; `blind` are pages it does not see."""

    def __init__(self, child: trackers.Child, blind: set[int]) -> None:
        self._child, self._blind, self._before = child, blind, b""

    def _read(self) -> bytes:
        with Path(f"/proc/{self._child.process.pid}/mem").open("rb", buffering=0) as stream:
            stream.seek(self._child.address)
            return stream.read(trackers.PAGE * trackers.PAGES)

    def arm(self) -> None:
        self._before = self._read()

    def collect(self) -> tuple[int, ...]:
        now, before, size = self._read(), self._before, trackers.PAGE
        self._before = now
        pages = (p for p in range(trackers.PAGES) if now[p * size :][:size] != before[p * size :][:size])
        return tuple(p for p in pages if p not in self._blind)

    def close(self) -> None:
        pass


Make = Callable[[trackers.Child, HostPaths], trackers.Tracker]
PROBES: list[Callable[[HostPaths, Make], Finding]] = [dirtypages.userfaultfd, dirtypages.soft_dirty]


@pytest.mark.parametrize("probe", PROBES)
def test_a_tracker_that_sees_exactly_what_was_written_is_ok(probe: Callable[[HostPaths, Make], Finding]) -> None:
    assert probe(HostPaths(), lambda child, _: Oracle(child, set())).status is Health.OK


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("blind", [{255}, set(range(256))], ids=["one page missed", "everything reads as clean"])
def test_a_tracker_that_misses_a_page_is_not_used(probe: Callable[[HostPaths, Make], Finding], blind: set[int]) -> None:
    found = probe(HostPaths(), lambda child, _: Oracle(child, blind))
    assert "were written and" in wrong(found, Health.DEGRADED)


@pytest.mark.parametrize("probe", PROBES)
def test_a_kernel_that_refuses_a_tracker_is_said(probe: Callable[[HostPaths, Make], Finding]) -> None:
    def refuse(child: trackers.Child, paths: HostPaths) -> trackers.Tracker:
        raise OSError(38, "Function not implemented", "userfaultfd")

    assert "userfaultfd: Function not implemented" in wrong(probe(HostPaths(), refuse), Health.DEGRADED)


# --- PSI


def test_psi_needs_every_resource_in_the_kernels_format(tmp_path: Path) -> None:
    (tmp_path / "pressure").mkdir()
    line = "some avg10=1.25 avg60=0.00 avg300=0.00 total=7\n"
    for resource in ("cpu", "memory", "io"):
        (tmp_path / "pressure" / resource).write_text(line)
    found = pressure.probe(HostPaths(proc=tmp_path))
    assert found.status is Health.OK
    assert "memory 1.25 %" in found.detail
    (tmp_path / "pressure/io").write_text("nonsense\n")
    assert "format" in wrong(pressure.probe(HostPaths(proc=tmp_path)), Health.DEGRADED)
    (tmp_path / "pressure/io").unlink()
    assert "No such file" in wrong(pressure.probe(HostPaths(proc=tmp_path)), Health.DEGRADED)


# --- database


def test_a_database_that_is_missing_newer_or_damaged_fails(settings: Settings) -> None:
    file = Path(settings.state_dir) / "hvctl.db"
    found = database.probe(settings)
    assert str(file) in wrong(found, Health.FAILING)
    assert found.fixable
    assert not file.exists()
    with Store(settings.database) as store:
        store.migrate()
    assert database.probe(settings).status is Health.OK
    connection = sqlite3.connect(file)
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    connection.close()
    found = database.probe(settings)
    assert "newer" in wrong(found, Health.FAILING)
    assert not found.fixable
    file.write_bytes(b"not a database at all" * 100)
    wrong(database.probe(settings), Health.FAILING)


def test_a_database_that_became_read_only_fails(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(settings.database) as store:
        store.migrate()
    opened = sqlite3.connect
    read_only = lambda name, **more: opened(name.replace("mode=rw", "mode=ro"), **more)  # noqa: E731
    monkeypatch.setattr("hvctl.adapters.store.database.sqlite3.connect", read_only)
    found = database.probe(settings)
    assert "it cannot be written" in wrong(found, Health.FAILING)
    assert found.remedy.startswith("see whether its file system became read-only: findmnt -T ")


# --- permissions


@pytest.fixture
def prepared(settings: Settings, paths: HostPaths) -> Settings:
    for folder, mode in hostprep.folders(settings):
        folder.mkdir(parents=True)
        folder.chmod(mode)
    (Path(settings.state_dir) / "hvctl.db").touch(0o600)
    (settings.locks_dir / "a.lock").touch(0o600)
    (settings.images_dir / "micro").mkdir()
    (settings.images_dir / "micro/kernel").touch(0o644)
    (settings.vms_dir / "u").mkdir()
    (settings.vms_dir / "u").chmod(0o711)
    (settings.vms_dir / "u/data.qcow2").touch(0o600)
    (settings.vms_dir / "u/qmp").mkdir(mode=0o700)
    (settings.vms_dir / "u/qmp/m.sock").touch()
    (settings.vms_dir / "u/qmp/m.sock").chmod(0o777)
    return settings


def test_prepared_folders_are_ok(prepared: Settings, paths: HostPaths) -> None:
    assert permissions.probe(prepared, paths) == ok("permissions", permissions.probe(prepared, paths).detail)


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("state/hvctl.db", 0o644),
        ("state/hvctl.db", 0o620),
        ("state/vms/u/data.qcow2", 0o604),
        ("state/vms/u", 0o733),
        ("state/vms/u/qmp", 0o711),
        ("state/images/micro/kernel", 0o646),
        ("state", 0o777),
        ("run/locks", 0o711),
        ("ram/snapshots", 0o700),
    ],
)
def test_a_mode_that_lets_others_in_or_qemu_out_is_found(
    prepared: Settings, paths: HostPaths, tmp_path: Path, path: str, mode: int
) -> None:
    (tmp_path / path).chmod(mode)
    assert f"{tmp_path / path}" in wrong(permissions.probe(prepared, paths), Health.FAILING)


def test_links_missing_folders_and_strangers_files_are_found(
    prepared: Settings, paths: HostPaths, tmp_path: Path
) -> None:
    link = prepared.snapshots_dir / "x"
    link.symlink_to("/etc")
    assert f"{link}: is a symbolic link" in wrong(permissions.probe(prepared, paths), Health.FAILING)
    link.unlink()
    prepared.snapshots_dir.rmdir()
    found = permissions.probe(prepared, paths)
    assert f"{prepared.snapshots_dir}: is missing" in wrong(found, Health.FAILING)
    assert found.fixable


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_found_and_qemus_own_is_not(
    prepared: Settings, paths: HostPaths, tmp_path: Path
) -> None:
    overlay = prepared.vms_dir / "u/data.qcow2"
    os.chown(overlay, 12345, 12345)
    assert "12345" in wrong(permissions.probe(prepared, paths), Health.FAILING)
    paths.qemu_conf.write_text('user = "+12345"\n')
    assert permissions.probe(prepared, paths).status is Health.OK


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_an_image_of_qemus_user_is_found_and_the_link_of_a_vm_to_its_image_is_not(
    prepared: Settings, paths: HostPaths
) -> None:
    paths.qemu_conf.write_text('user = "+12345"\n')
    image = prepared.images_dir / "micro"
    (prepared.vms_dir / "u/image").symlink_to(image)
    assert permissions.probe(prepared, paths).status is Health.OK
    os.chown(image / "kernel", 12345, 12345)
    assert "every VM boots" in wrong(permissions.probe(prepared, paths), Health.FAILING)
    os.chown(image / "kernel", 0, 0)
    (prepared.vms_dir / "u/image").unlink()
    (prepared.vms_dir / "u/image").symlink_to("/etc")
    assert "symbolic link" in wrong(permissions.probe(prepared, paths), Health.FAILING)


def test_a_parent_that_others_may_write_is_found_unless_it_is_sticky(settings: Settings, paths: HostPaths) -> None:
    parent = Path(settings.state_dir) / "deep"
    inner = replace(settings, state_dir=str(parent / "state"))
    for folder, mode in hostprep.folders(inner):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(mode)
    parent.chmod(0o777)
    assert str(parent) in wrong(permissions.probe(inner, paths), Health.FAILING)
    parent.chmod(0o1777)
    assert permissions.probe(inner, paths).status is Health.OK
