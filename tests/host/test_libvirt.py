"""libvirt's domains for real: QEMU processes without an operating system, checked from outside with virsh and /proc."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl.adapters.libvirt import domainxml
from hvctl.adapters.libvirt.calls import with_deadline
from hvctl.adapters.libvirt.host import LibvirtDomains
from hvctl.errors import DeadlineError, GuestError, NotFoundError, RefusedError, UnreachableError
from hvctl.model.allocation import Allocation, DiskLimit, Record
from hvctl.model.vm import Accel, DiskSpec, State, VmSpec
from hvctl.settings import Settings

pytestmark = [pytest.mark.host, pytest.mark.timeout(600)]


def virsh(*arguments: str) -> str:
    return subprocess.run(["virsh", "-q", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def halting_kernel() -> bytes:
    """The smallest that QEMU takes for a Linux kernel: its header, and code that halts the CPU."""
    image = bytearray(4096)
    image[0x1F1] = 1  # sectors of set-up code
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x200:0x202] = b"\xeb\x70"  # jump over the header
    image[0x202:0x208] = b"HdrS\x06\x02"
    image[0x211] = 1  # loaded high
    image[0x22C:0x230] = (0x37FFFFFF).to_bytes(4, "little")  # where the initrd may end
    image[0x272:0x276] = b"\xfa\xf4\xeb\xfd"  # cli; hlt; again
    return bytes(image)


@pytest.fixture
def domains() -> Iterator[LibvirtDomains]:
    made = LibvirtDomains(Settings())
    yield made
    made.close()


@pytest.fixture
def folder(domains: LibvirtDomains) -> Iterator[Path]:
    """A folder that QEMU's user may reach, which pytest's own are not."""
    facts = domains.facts()
    path = Path("/var/lib/libvirt/images") / f"hvctl-test-{uuid.uuid4().hex[:8]}"
    path.mkdir(mode=0o700, parents=True)
    os.chown(path, facts.qemu_uid, facts.qemu_gid)
    yield path
    for left in path.iterdir():
        left.unlink()
    path.rmdir()


@pytest.fixture
def spec(domains: LibvirtDomains, folder: Path) -> Iterator[VmSpec]:
    """A defined VM without an operating system: its kernel halts at once."""
    disk = folder / "data.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "16M"], check=True)
    kernel, initrd = folder / "kernel", folder / "initrd"
    kernel.write_bytes(halting_kernel())
    initrd.write_bytes(bytes(512))
    # libvirt gives no file of such a domain to QEMU's user: whoever makes the disk does.
    facts = domains.facts()
    os.chown(disk, facts.qemu_uid, facts.qemu_gid)
    made = uuid.uuid4()
    spec = VmSpec(
        uuid=str(made),
        name=f"hvctl-test-{made.hex[:8]}",
        image="none",
        accel=Accel.TCG,
        vcpus=1,
        max_vcpus=4,
        memory=64 << 20,
        max_memory=128 << 20,
        kernel=str(kernel),
        initrd=str(initrd),
        cmdline="quiet",
        folder=str(folder),
        monitor=str(folder / "monitor.sock"),
        disks=(DiskSpec("data", "vda", str(disk), 16 << 20),),
        record=Record(Allocation(1, 64 << 20), labels={"a<b": "c&d"}),
    )
    domains.define(spec)
    yield spec
    domains.destroy(spec.uuid)
    domains.undefine(spec.uuid)


@pytest.fixture
def running(domains: LibvirtDomains, spec: VmSpec) -> VmSpec:
    domains.start(spec.uuid)
    return spec


def test_a_defined_vm_is_seen_as_it_was_asked_for(domains: LibvirtDomains, spec: VmSpec) -> None:
    vm = domains.get(spec.name)
    assert vm == domains.get(spec.uuid)
    assert vm in domains.list()
    assert (vm.state, vm.process, vm.persistent, vm.accel) == (State.OFF, None, True, Accel.TCG)
    assert (vm.allocation.vcpus, vm.allocation.memory, vm.max_vcpus, vm.max_memory) == (1, 64 << 20, 4, 128 << 20)
    assert vm.record == spec.record
    assert vm.missing == ()
    domains.define(spec)
    assert virsh("domuuid", spec.name) == spec.uuid


def test_a_qemu_that_hangs_is_seen_and_can_be_ended(domains: LibvirtDomains, running: VmSpec) -> None:
    """Whatever job of libvirt waits for it by then; and it hides no other VM of its host."""
    before = domains.get(running.uuid)
    assert before.process is not None
    os.kill(before.process.pid, signal.SIGSTOP)
    asked = threading.Thread(target=lambda: subprocess.run(["virsh", "-q", "dommemstat", running.uuid], check=False))
    asked.start()
    assert domains.get(running.name) == before
    assert before in domains.list()
    domains.destroy(running.uuid)
    asked.join()
    assert domains.get(running.uuid).state is State.OFF


def test_a_vms_life_and_that_each_effect_may_be_repeated(domains: LibvirtDomains, running: VmSpec) -> None:
    domains.start(running.uuid)
    vm = domains.get(running.uuid)
    assert vm.process is not None
    assert running.uuid.encode() in Path(f"/proc/{vm.process.pid}/cmdline").read_bytes()
    assert [Path(region.path).stat().st_size for region in vm.ram] == [running.max_memory]
    assert vm.missing == ()
    assert Path(running.monitor).is_socket()
    assert Path(domains.console(running.uuid)).is_char_device()
    for _ in range(2):
        domains.pause(running.uuid)
        assert virsh("domstate", running.name) == "paused"
    assert (domains.get(running.uuid).state, domains.get(running.uuid).reason) == (State.PAUSED, "user")
    for _ in range(2):
        domains.resume(running.uuid)
        assert virsh("domstate", running.name) == "running"
    with pytest.raises(RefusedError, match="active"):
        domains.undefine(running.uuid)
    for _ in range(2):
        domains.destroy(running.uuid)
        assert virsh("domstate", running.name) == "shut off"
    for _ in range(2):
        domains.undefine(running.uuid)
    with pytest.raises(NotFoundError):
        domains.get(running.uuid)
    with pytest.raises(NotFoundError):
        domains.start(running.uuid)


def test_waiting_ends_when_somebody_else_stops_the_vm(domains: LibvirtDomains, running: VmSpec) -> None:
    assert domains.wait_state(running.uuid, frozenset({State.OFF}), 0.2) is State.RUNNING
    other = threading.Timer(0.5, virsh, ("destroy", running.name))
    other.start()
    assert domains.wait_state(running.uuid, frozenset({State.OFF}), 60) is State.OFF
    other.join()


@pytest.mark.parametrize("active", [False, True])
def test_cpu_and_disk_limits_hold_and_go(domains: LibvirtDomains, spec: VmSpec, active: bool) -> None:
    where = ["--config"]
    if active:
        domains.start(spec.uuid)
        where.append("--live")
    for quota in (150, 7, None):
        # Somebody's limit of each vCPU, which would hold beside that of the VM.
        virsh("schedinfo", spec.name, *where, "--set", "vcpu_quota=3000")
        domains.set_cpu_quota(spec.uuid, quota)
        assert domains.get(spec.uuid).allocation.cpu_quota == quota
    for weight in (1, 77, 10_000, None):
        domains.set_cpu_weight(spec.uuid, weight)
        assert domains.get(spec.uuid).allocation.cpu_weight == weight
    for limit in (
        DiskLimit("vda", 100, 1 << 20, 200, 2 << 20, 5),
        DiskLimit("vda", iops=100),
        DiskLimit("vda", rate=5 << 20, rate_burst=10 << 20),
        DiskLimit("vda"),
    ):
        domains.set_disk_limit(spec.uuid, limit)
        assert domains.get(spec.uuid).allocation.disks == (limit,)
        assert f"total_iops_sec : {limit.iops or 0}" in " ".join(virsh("blkdeviotune", spec.name, "vda").split())


def test_vcpus_are_plugged_and_an_emulated_one_is_not_taken_away(domains: LibvirtDomains, running: VmSpec) -> None:
    domains.set_vcpus(running.uuid, 3)
    assert virsh("vcpucount", running.name, "--live", "--current") == "3"
    assert virsh("vcpucount", running.name, "--config", "--current") == "3"
    with pytest.raises(GuestError, match="emulated"):
        domains.set_vcpus(running.uuid, 2)
    assert virsh("vcpucount", running.name, "--config", "--current") == "3"
    with pytest.raises(RefusedError, match="1 to 4"):
        domains.set_vcpus(running.uuid, 5)


def test_a_balloon_that_no_driver_moves_is_reported_as_it_is(domains: LibvirtDomains, running: VmSpec) -> None:
    assert domains.set_balloon(running.uuid, 96 << 20) == running.max_memory
    assert not domains.balloon(running.uuid).reported
    with pytest.raises(RefusedError):
        domains.set_balloon(running.uuid, running.max_memory + 1024)


def test_the_record_is_written_beside_the_metadata_of_others(domains: LibvirtDomains, running: VmSpec) -> None:
    virsh("metadata", running.name, "urn:other", "--key", "o", "--set", "<theirs/>", "--config", "--live")
    record = Record(Allocation(2, 1 << 26, cpu_quota=50), image="x", protected=True, labels={"<": "]]>&"})
    domains.set_record(running.uuid, record)
    assert domains.get(running.uuid).record == record
    for _ in range(2):
        domains.set_record(running.uuid, None)
        assert domains.get(running.uuid).record is None
    assert "theirs" in virsh("metadata", running.name, "urn:other", "--config")


def test_an_agent_that_is_not_there_is_unreachable(domains: LibvirtDomains, running: VmSpec) -> None:
    with pytest.raises(UnreachableError, match="not connected"):
        domains.agent(running.uuid, "guest-ping", {}, 1)


def test_a_foreign_domain_is_listed_and_adopted_in_place(domains: LibvirtDomains, folder: Path) -> None:
    name, made = f"hvctl test {uuid.uuid4().hex[:8]} <&'ü>", str(uuid.uuid4())
    document = f"""<domain type='qemu'><name>{name.replace("&", "&amp;").replace("<", "&lt;")}</name><uuid>{made}</uuid>
      <metadata><o:x xmlns:o='urn:o' a='1'><!-- kept --><o:y>z</o:y></o:x></metadata>
      <memory unit='MiB'>64</memory><vcpu>1</vcpu><os><type arch='x86_64'>hvm</type></os>
      <devices><video><model type='none'/></video></devices></domain>"""
    path = folder / "foreign.xml"
    path.write_text(document)
    virsh("define", str(path))
    try:
        vm = domains.get(name)
        assert vm in domains.list()
        assert (vm.name, vm.uuid, vm.record) == (name, made, None)
        assert "a second QMP monitor" in vm.missing
        before = domains.xml(made)
        after = domainxml.adopted(before, str(folder / "monitor.sock"), str(folder / "pulse"))
        domains.redefine(made, after)
        assert domains.get(made).missing == ()
        kept = [line for line in before.splitlines() if not line.startswith("<domain")]
        now = iter(virsh("dumpxml", made, "--inactive").splitlines())
        assert all(line in now for line in kept), "adoption lost or moved a line"
    finally:
        virsh("undefine", made)


def test_a_call_that_never_ends_is_given_up() -> None:
    release = threading.Event()
    with pytest.raises(DeadlineError, match="unknown"):
        with_deadline("wait for ever", 0.05, release.wait)
    release.set()


def test_libvirt_that_is_not_there_is_unreachable(tmp_path: Path) -> None:
    nobody = LibvirtDomains(Settings(uri=f"qemu+unix:///system?socket={tmp_path}/none"))
    with pytest.raises(UnreachableError) as e:
        nobody.list()
    assert e.value.hint is not None
    assert "hvctl host prepare" in e.value.hint
