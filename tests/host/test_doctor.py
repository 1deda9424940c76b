"""`hvctl doctor` on the real host: every probe answers by doing, sees what is really there, and leaves nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl.adapters import probes
from hvctl.adapters.images import imagestore
from hvctl.adapters.node import hostprep, kvmprobe
from hvctl.adapters.probes import dirtypages, hypervisor, kvm, traffic
from hvctl.adapters.store.store import Store
from hvctl.errors import NotFoundError, RefusedError
from hvctl.model.allocation import NicLimit
from hvctl.model.finding import Health
from hvctl.settings import Settings

pytestmark = pytest.mark.host


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """The host's libvirt, with state of our own, prepared as `host prepare` does."""
    found = Settings(state_dir=f"{tmp_path}/state", run_dir=f"{tmp_path}/run")
    for path, mode in hostprep.folders(found):
        if path.is_relative_to(tmp_path):
            hostprep.apply(hostprep.HostChange("folder", "", "", "", hostprep.MakeFolder(path, mode)))
    with Store(found.database) as store:
        store.migrate()
    return found


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    def links() -> str:
        return subprocess.run(["ip", "-o", "link"], check=True, capture_output=True, text=True).stdout

    before = "probe0" in links()
    yield
    assert ("probe0" in links()) is before
    assert not list(Path("/sys/fs/cgroup").glob("**/hvctl-probe-*"))


def test_every_probe_answers_under_its_own_name(settings: Settings) -> None:
    names = [name for name in probes.PROBES if name not in ("kvm", "libvirt", "qmp-monitors")]
    found = {f.name: f for f in probes.examine(settings, names)}
    assert list(found) == names
    assert {f.name for f in found.values() if not f.detail} == set()
    assert {f.name for f in found.values() if f.status is not Health.OK and not (f.lost and f.remedy)} == set()
    assert not [f for f in found.values() if "broke" in f.detail or "no answer" in f.detail]
    for name in ("qemu", "cgroups", "traffic-control", "database"):
        assert found[name].status is Health.OK, found[name]


def test_probes_close_what_they_open() -> None:
    def open_files() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    asked = (dirtypages.userfaultfd, dirtypages.soft_dirty, traffic.probe, hypervisor.qemu)
    for probe in asked:
        probe()
    before = open_files()
    for probe in asked:
        probe()
    assert open_files() == before


def test_libvirt_and_qemu_tell_the_same_version(settings: Settings) -> None:
    libvirt, qemu = hypervisor.libvirt(settings), hypervisor.qemu()
    assert qemu.status is Health.OK
    assert libvirt.status in (Health.OK, Health.DEGRADED)
    # libvirt may not know its QEMU for a moment while it asks it again.
    assert (qemu.detail.split()[1] in libvirt.detail) is (libvirt.status is Health.OK)


def test_the_trackers_tell_the_truth_about_this_kernel() -> None:
    """userfaultfd where the kernel has it; soft-dirty exactly if /proc/PID/smaps says that the kernel tracks it."""
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if release >= (6, 7):
        assert dirtypages.userfaultfd().status is Health.OK
    soft = dirtypages.soft_dirty()
    flags = [line for line in Path("/proc/self/smaps").read_text().splitlines() if line.startswith("VmFlags")]
    tracked = any(" sd" in line for line in flags)
    assert (soft.status is Health.OK) is tracked, soft.detail


def test_a_kernel_that_shapes_one_direction_only_is_degraded_with_that_direction() -> None:
    class NoIngress:
        def __init__(self, namespace: str) -> None:
            self._real = traffic._kernel(namespace)

        def set_limit(self, tap: str, limit: NicLimit, owner: str) -> None:
            if limit.outbound:
                raise RefusedError("no such device: ifb.")
            self._real.set_limit(tap, limit, owner)

        def limit(self, tap: str, mac: str) -> NicLimit:
            return self._real.limit(tap, mac)

        def clear(self, owner: str) -> None:
            self._real.clear(owner)

    found = traffic.probe(network=NoIngress)  # type: ignore[arg-type]
    assert found.status is Health.FAILING
    assert found.lost == "limits of traffic from the guest"


def test_a_kernel_that_forgets_a_limit_is_seen() -> None:
    class Forgets:
        def __init__(self, namespace: str) -> None: ...

        def set_limit(self, tap: str, limit: NicLimit, owner: str) -> None: ...

        def limit(self, tap: str, mac: str) -> NicLimit:
            return NicLimit(mac)

        def clear(self, owner: str) -> None: ...

    found = traffic.probe(network=Forgets)  # type: ignore[arg-type]
    assert found.status is Health.FAILING
    assert "to the guest" in found.detail


def test_kvm_is_decided_by_booting_and_the_answer_kept(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        image = imagestore.find(Settings(), "micro")
    except NotFoundError:
        pytest.skip("the micro image is not built")
    monkeypatch.setattr(imagestore, "find", lambda _, name: image)
    works, reason = kvmprobe.kvm_works(settings)
    kept = kvmprobe.answer_file(settings).stat()
    found = kvm.probe(settings)
    assert (found.status is Health.OK) is works
    assert found.detail == reason
    assert kvmprobe.answer_file(settings).stat().st_ino == kept.st_ino
