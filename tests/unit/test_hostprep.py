"""`hvctl host prepare` finds what a host lacks, changes exactly that, and finds nothing the second time. Everything
here is a copy in a temporary folder; tests/host/test_prepare.py starts the real daemons."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hvctl.adapters.node import daemons, kvmdevice, qemuconf
from hvctl.adapters.node.hostpaths import HostPaths
from hvctl.adapters.node.hostprep import HostChange, RestartLibvirt, _apparmor, apply, changes
from hvctl.adapters.probes import kvm
from hvctl.errors import HvctlError, NotUndoneError, RefusedError, UnreachableError
from hvctl.model.finding import Health
from hvctl.settings import Settings

CONF = """# Master configuration file for the QEMU driver.
#user = "libvirt-qemu"

# NOTE: big files will be stored here
#memory_backing_dir = "/var/lib/libvirt/qemu/ram"

max_core = "unlimited"  # stays
"""


@dataclass
class Tools:
    """The host's commands: notes every call, and does to the copy of the host what the command would do."""

    paths: HostPaths
    calls: list[tuple[str, ...]] = field(default_factory=list)
    enabled: set[str] = field(default_factory=set)
    active: set[str] = field(default_factory=set)
    guests: list[str] = field(default_factory=lambda: ["guest-1\n", "guest-1\n"])
    ended: set[str] = field(default_factory=set)

    def __call__(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        self.calls.append(tuple(argv))
        out = ""
        match tuple(argv):
            case ("libvirtd" | "virtlogd" as name, "-d"):
                pid = {"libvirtd": 100, "virtlogd": 101}[name]
                process(self.paths, pid, name, f"{name}\0-d\0")
                {"libvirtd": self.paths.libvirtd_pid, "virtlogd": self.paths.virtlogd_pid}[name].write_text(f"{pid}\n")
            case ("modprobe", "tun"):
                self.paths.tun.touch()
            case ("systemctl", "is-active", unit):
                out = "active\n" if unit in self.active else "inactive\n"
            case ("systemctl", "is-enabled", unit):
                if unit not in self.enabled:
                    raise HvctlError("systemctl failed with status 1: disabled.")
                out = "enabled\n"
            case ("systemctl", "enable", "--now", unit):
                self.enabled.add(unit)
                self.active.add(unit)
            case ("systemctl", "enable", unit):
                self.enabled.add(unit)
            case ("systemctl", "restart", "libvirtd.service"):
                os.utime(self.paths.libvirtd_pid)
            case ("virsh", "-c", _, "list", "--uuid"):
                out = self.guests.pop(0)
            case ("virsh", "-c", _, "dommemstat", guest):
                if guest in self.ended:
                    raise HvctlError("virsh failed with status 1: error: Domain not found.")
            case other:
                raise AssertionError(f"unexpected command {other}")
        return subprocess.CompletedProcess(list(argv), 0, out, "")

    @property
    def effects(self) -> list[str]:
        return [" ".join(c) for c in self.calls if c[1] not in ("is-active", "is-enabled")]


def process(paths: HostPaths, pid: int, name: str, command: str = "") -> None:
    folder = paths.proc / str(pid)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comm").write_text(f"{name}\n")
    (folder / "cmdline").write_text(command)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(state_dir=f"{tmp_path}/state", run_dir=f"{tmp_path}/run/hvctl", ram_dir=f"{tmp_path}/shm/hvctl")


@pytest.fixture
def paths(tmp_path: Path) -> HostPaths:
    found = HostPaths(
        proc=tmp_path / "proc",
        kvm=tmp_path / "kvm",
        tun=tmp_path / "tun",
        qemu_conf=tmp_path / "qemu.conf",
        libvirtd_pid=tmp_path / "libvirtd.pid",
        virtlogd_pid=tmp_path / "virtlogd.pid",
        tmpfiles=tmp_path / "hvctl.conf",
        apparmor=tmp_path / "apparmor",
        apparmor_local=tmp_path / "local" / "libvirt-qemu",
    )
    process(found, 1, "init")
    found.qemu_conf.write_text(CONF)
    found.qemu_conf.chmod(0o600)
    return found


@pytest.fixture
def tools(paths: HostPaths) -> Tools:
    return Tools(paths)


def prepare(settings: Settings, paths: HostPaths, tools: Tools, count: int | None = None) -> tuple[HostChange, ...]:
    planned = changes(settings, paths, tools)
    for change in planned[:count]:
        apply(change, tools)
    return planned


def test_a_bare_host_is_prepared_and_the_second_run_changes_nothing(
    settings: Settings, paths: HostPaths, tools: Tools, tmp_path: Path
) -> None:
    planned = prepare(settings, paths, tools)
    assert all(c.name and c.now and c.wanted and c.how for c in planned)
    modes = {p: stat.S_IMODE((tmp_path / p).stat().st_mode) for p in ("state", "run/hvctl/locks", "shm/hvctl/guests")}
    assert modes == {"state": 0o711, "run/hvctl/locks": 0o700, "shm/hvctl/guests": 0o711}
    assert tools.effects == ["modprobe tun", "virtlogd -d", "libvirtd -d"]
    assert not paths.tmpfiles.exists()
    before = {p: (p.lstat().st_mtime_ns, p.lstat().st_ino) for p in tmp_path.rglob("*")}
    assert prepare(settings, paths, tools) == ()
    assert {p: (p.lstat().st_mtime_ns, p.lstat().st_ino) for p in tmp_path.rglob("*")} == before


def test_looking_for_changes_makes_none(settings: Settings, paths: HostPaths, tools: Tools, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert changes(settings, paths, tools)
    assert sorted(tmp_path.rglob("*")) == before
    assert tools.effects == []


@pytest.mark.parametrize("systemd", [False, True])
def test_an_interrupted_preparation_is_finished_by_the_next(
    settings: Settings, paths: HostPaths, tools: Tools, systemd: bool
) -> None:
    if systemd:
        process(paths, 1, "systemd")
    steps = 0
    while prepare(settings, paths, tools, count=1):
        steps += 1
        assert steps < 30
    assert changes(settings, paths, tools) == ()
    assert qemuconf.setting(paths.qemu_conf, "memory_backing_dir") == str(settings.guests_ram_dir)


def test_with_systemd_units_are_enabled_and_folders_are_made_at_boot(
    settings: Settings, paths: HostPaths, tools: Tools
) -> None:
    process(paths, 1, "systemd")
    tools.active.add("libvirtd.socket")
    prepare(settings, paths, tools)
    assert tools.effects == [
        "modprobe tun",
        "systemctl enable --now virtlogd.socket",
        "systemctl enable libvirtd.service",
    ]
    lines = paths.tmpfiles.read_text().splitlines()
    assert f"d {settings.guests_ram_dir} 0711 root root -" in lines
    assert f"d {settings.locks_dir} 0700 root root -" in lines
    assert not any(settings.state_dir in line for line in lines)
    assert changes(settings, paths, tools) == ()


def test_a_pid_file_of_another_program_is_no_daemon(settings: Settings, paths: HostPaths, tools: Tools) -> None:
    paths.libvirtd_pid.write_text("77\n")
    process(paths, 77, "sleep")
    prepare(settings, paths, tools)
    assert "libvirtd -d" in tools.effects


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o700])
def test_a_folder_with_another_mode_gets_its_own(settings: Settings, paths: HostPaths, tools: Tools, mode: int) -> None:
    Path(settings.state_dir).mkdir()
    Path(settings.state_dir).chmod(mode)
    (change,) = (c for c in changes(settings, paths, tools) if c.name == f"folder {settings.state_dir}")
    assert f"{mode:04o}" in change.now
    apply(change, tools)
    assert stat.S_IMODE(Path(settings.state_dir).stat().st_mode) == 0o711


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_stands_where_a_folder_should_be_is_left_alone(
    settings: Settings, paths: HostPaths, tools: Tools, tmp_path: Path, kind: str
) -> None:
    other = tmp_path / "other"
    other.mkdir(mode=0o755)
    state = Path(settings.state_dir)
    if kind == "link":
        state.symlink_to(other)
    else:
        state.write_text("mine")
    change = changes(settings, paths, tools)[0]
    assert change.now == "not a folder"
    with pytest.raises(RefusedError, match="not a folder"):
        apply(change, tools)
    assert stat.S_IMODE(other.stat().st_mode) == 0o755
    assert state.is_symlink() or state.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize(("mode", "closed"), [(0o600, True), (0o640, True), (0o666, False)])
def test_a_kvm_device_closed_to_qemus_group_is_opened(
    settings: Settings, paths: HostPaths, tools: Tools, monkeypatch: pytest.MonkeyPatch, mode: int, closed: bool
) -> None:
    monkeypatch.setattr(kvmdevice, "GROUP", "daemon")
    paths.kvm.touch()
    paths.kvm.chmod(mode)
    found = [c for c in changes(settings, paths, tools) if c.name == f"device {paths.kvm}"]
    assert bool(found) is closed
    assert (kvm.device(paths).status is Health.DEGRADED) is closed
    for change in found:
        apply(change, tools)
        assert (stat.S_IMODE(paths.kvm.stat().st_mode), paths.kvm.group()) == (0o660, "daemon")
    assert kvm.device(paths).status is Health.OK


# --- qemu.conf


def test_qemu_conf_keeps_everything_else_and_what_was_before(settings: Settings, paths: HostPaths) -> None:
    qemuconf.change_setting(paths.qemu_conf, "memory_backing_dir", "/one")
    lines = paths.qemu_conf.read_text().splitlines()
    assert [line for line in lines if line != 'memory_backing_dir = "/one"'] == CONF.splitlines()
    assert (
        lines.index('memory_backing_dir = "/one"')
        == CONF.splitlines().index('#memory_backing_dir = "/var/lib/libvirt/qemu/ram"') + 1
    )
    qemuconf.change_setting(paths.qemu_conf, "memory_backing_dir", "/two")
    assert paths.qemu_conf.read_text().splitlines() == [line.replace("/one", "/two") for line in lines]
    backup = paths.qemu_conf.with_name("qemu.conf.before-hvctl")
    assert backup.read_text() == CONF
    assert {stat.S_IMODE(f.stat().st_mode) for f in (backup, paths.qemu_conf)} == {0o600}
    assert sorted(p.name for p in paths.qemu_conf.parent.glob("*qemu*")) == ["qemu.conf", "qemu.conf.before-hvctl"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('x = "/a"\n', "/a"),
        ("  x='/a'\n", "/a"),
        ('x = "/a"\nx = "/b"\n', "/b"),
        ("x = 1 # one\n", "1"),
        ('#x = "/a"\n', None),
        ('xx = "/a"\n', None),
        ("", None),
    ],
)
def test_qemu_conf_is_read_as_libvirt_reads_it(paths: HostPaths, text: str, value: str | None) -> None:
    paths.qemu_conf.write_text(text)
    assert qemuconf.setting(paths.qemu_conf, "x") == value
    qemuconf.change_setting(paths.qemu_conf, "x", "/new")
    assert qemuconf.setting(paths.qemu_conf, "x") == "/new"
    assert len(paths.qemu_conf.read_text().splitlines()) == max(1, len(text.splitlines()) + (value is None))


def test_a_value_that_would_end_its_quotes_is_refused(paths: HostPaths) -> None:
    with pytest.raises(RefusedError):
        qemuconf.change_setting(paths.qemu_conf, "x", 'a"\nuser = "root')
    assert paths.qemu_conf.read_text() == CONF


def test_without_libvirt_the_package_is_named(settings: Settings, paths: HostPaths, tools: Tools) -> None:
    paths.qemu_conf.unlink()
    with pytest.raises(UnreachableError) as error:
        changes(settings, paths, tools)
    assert error.value.hint == "apt install libvirt-daemon-system"


# --- the restart of libvirtd


@pytest.fixture
def running(settings: Settings, paths: HostPaths, tools: Tools, monkeypatch: pytest.MonkeyPatch) -> HostPaths:
    """A prepared host whose qemu.conf is newer than its libvirtd."""
    prepare(settings, paths, tools)
    tools.calls.clear()
    old = paths.qemu_conf.stat().st_mtime_ns - 10**9
    os.utime(paths.libvirtd_pid, ns=(old, old))
    monkeypatch.setattr(daemons, "_stop", lambda pid: (paths.proc / str(pid) / "comm").unlink())
    return paths


def test_a_libvirtd_older_than_its_configuration_is_restarted_once(
    settings: Settings, running: HostPaths, tools: Tools
) -> None:
    (change,) = changes(settings, running, tools)
    assert isinstance(change.action, RestartLibvirt)
    apply(change, tools)
    assert tools.effects == [
        "virsh -c qemu:///system list --uuid",
        "libvirtd -d",
        "virsh -c qemu:///system list --uuid",
        "virsh -c qemu:///system dommemstat guest-1",
    ]
    assert changes(settings, running, tools) == ()


def test_a_changed_qemu_conf_restarts_a_running_libvirtd_after_the_change(
    settings: Settings, running: HostPaths, tools: Tools
) -> None:
    os.utime(running.libvirtd_pid)
    running.qemu_conf.write_text(CONF)
    os.utime(running.qemu_conf, ns=(0, 0))
    planned = prepare(settings, running, tools)
    assert [c.name.split()[0] for c in planned] == ["memory_backing_dir", "libvirtd"]
    assert changes(settings, running, tools) == ()


def test_a_guest_that_is_gone_after_the_restart_is_an_error(
    settings: Settings, running: HostPaths, tools: Tools
) -> None:
    tools.guests = ["guest-1\nguest-2\n", "guest-1\n"]
    (change,) = changes(settings, running, tools)
    with pytest.raises(NotUndoneError, match="restart: guest-2"):
        apply(change, tools)


def test_a_guest_that_is_listed_until_libvirtd_has_tried_its_monitor_is_gone_too(
    settings: Settings, running: HostPaths, tools: Tools
) -> None:
    tools.guests = ["guest-1\nguest-2\n", "guest-1\nguest-2\n"]
    tools.ended = {"guest-2"}
    (change,) = changes(settings, running, tools)
    with pytest.raises(NotUndoneError, match="restart: guest-2"):
        apply(change, tools)


def test_a_libvirtd_in_the_foreground_of_a_supervisor_is_not_touched(
    settings: Settings, running: HostPaths, tools: Tools
) -> None:
    process(running, 100, "libvirtd", "libvirtd\0--verbose\0")
    (change,) = changes(settings, running, tools)
    with pytest.raises(RefusedError, match="foreground"):
        apply(change, tools)
    assert (running.proc / "100/comm").exists()
    assert "libvirtd --verbose" not in tools.effects


def test_with_systemd_the_unit_is_restarted(settings: Settings, running: HostPaths, tools: Tools) -> None:
    process(running, 1, "systemd")
    tools.active.add("libvirtd.service")
    prepare(settings, running, tools)
    assert "systemctl restart libvirtd.service" in tools.effects
    assert "libvirtd -d" not in tools.effects
    assert changes(settings, running, tools) == ()


# --- AppArmor


def rules(settings: Settings, paths: HostPaths, tools: Tools) -> list[HostChange]:
    return [c for c in changes(settings, paths, tools) if c.name.startswith("AppArmor")]


@pytest.mark.parametrize("enabled", [None, "N\n"])
def test_no_rules_where_apparmor_is_off(
    enabled: str | None, settings: Settings, paths: HostPaths, tools: Tools
) -> None:
    paths.apparmor_local.parent.mkdir()
    if enabled is not None:
        paths.apparmor.write_text(enabled)
    assert rules(settings, paths, tools) == []


def test_rules_are_added_once_and_what_others_wrote_stays(settings: Settings, paths: HostPaths, tools: Tools) -> None:
    paths.apparmor.write_text("Y\n")
    paths.apparmor_local.parent.mkdir()
    paths.apparmor_local.write_text("/srv/iso/** r,  # somebody's")
    (change,) = rules(settings, paths, tools)
    apply(change, tools)
    assert rules(settings, paths, tools) == []
    assert paths.apparmor_local.read_text().splitlines() == [
        "/srv/iso/** r,  # somebody's",
        "# hvctl host prepare: begin",
        f'"{settings.vms_dir}/*/qmp/monitor.sock" rw,',
        f'"{settings.vms_dir}/*/pulse.{{in,out}}" rw,',
        f'"{settings.images_dir}/*/{{kernel,initrd}}" r,',
        f'"{settings.snapshots_dir}/*/*/vmstate.qcow2" rwk,',
        '"/**.hvctl-standin" rwk,',
        '"/**.hvctl-backing" rk,',
        "# hvctl host prepare: end",
    ]
    moved = Settings(state_dir="/odd [place]*", run_dir=settings.run_dir, ram_dir=settings.ram_dir)
    (change,) = (c for c in _apparmor(moved, paths))
    apply(change, tools)
    text = paths.apparmor_local.read_text()
    assert text.count("begin") == text.count("somebody") == 1
    assert r'"/odd \[place\]\*/vms/*/qmp/monitor.sock" rw,' in text


def test_a_daemon_does_not_inherit_hvctls_umask(tmp_path: Path) -> None:
    """libvirtd with umask 077 makes folders of guest RAM that QEMU's user cannot enter."""
    from hvctl.adapters.tools import run_tool

    before = os.umask(0o077)
    try:
        run_tool(["mkdir", tmp_path / "made"])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o755
