"""What the real meter is made of, on files and threads of the tests' own: lives, PSI, counters, connections."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hvctl.adapters.kernel import process, vmlife
from hvctl.adapters.kernel.perfcounters import PerfCounters, vcpu_threads
from hvctl.adapters.kernel.vmlife import Life, Lives
from hvctl.adapters.libvirt.meter import _disks, _nics
from hvctl.adapters.network import guestconnections
from hvctl.adapters.network.guestconnections import Connections
from hvctl.adapters.probes import counters
from hvctl.model.finding import Health
from hvctl.model.meter import DiskCounters, NicCounters, Stalls
from hvctl.model.vm import Process

ME = Process(os.getpid(), process.start_time(os.getpid()) or 0, "boot")
# PERF_TYPE_SOFTWARE: task clock (ns), page faults, context switches. The kernel counts these on every machine.
SOFTWARE = ((1, 1), (1, 2), (1, 3))


# --- libvirt's words


def test_a_disk_of_which_libvirt_tells_little_hides_all() -> None:
    whole = {"block.count": 1, "block.0.name": "vda", "block.0.rd.reqs": 1, "block.0.wr.reqs": 2,
             "block.0.rd.bytes": 3, "block.0.wr.bytes": 4}  # fmt: skip
    assert _disks(whole) == (DiskCounters("vda", 1, 2, 3, 4),)
    assert _disks({**whole, "block.count": 2, "block.1.name": "vdb"}) is None
    assert _disks({}) == ()


def test_nics() -> None:
    whole = {"net.count": 1, "net.0.name": "tap0", "net.0.rx.bytes": 1, "net.0.tx.bytes": 2, "net.0.rx.pkts": 3,
             "net.0.tx.pkts": 4}  # fmt: skip
    assert _nics(whole) == (NicCounters("tap0", 1, 2, 3, 4),)
    assert _nics({"net.count": 1, "net.0.name": "tap0"}) is None


# --- lives


def group(root: Path, path: str, *, total: int = 1234) -> Path:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(("cpu", "memory", "io")):
        line = "avg10=1.50 avg60=0.00 avg300=0.00 total="
        (folder / f"{name}.pressure").write_text(f"some {line}{total + i}\nfull {line}7\n")
    return folder


def test_psi_is_what_some_of_a_vms_threads_waited(tmp_path: Path) -> None:
    life = Life(ME, group(tmp_path, "machine/vm"))
    assert life.stalls() == Stalls(1234, 1235, 1236)
    (tmp_path / "machine/vm/io.pressure").write_text("")
    assert life.stalls() is None
    assert Life(ME, None).stalls() is None


@pytest.mark.parametrize(
    ("inside", "found"),
    [
        ("/machine/qemu-1-a.libvirt-qemu/emulator", "machine/qemu-1-a.libvirt-qemu"),
        ("/machine.slice/machine-qemu.scope/libvirt/emulator", "machine.slice/machine-qemu.scope"),
        ("/", None),
        ("/user.slice/session-1.scope", None),
        ("/machine/without-psi", None),
    ],
)
@pytest.mark.parametrize("mount", [".", "unified"])
def test_the_group_of_a_vm_is_its_own_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str, found: str | None, mount: str
) -> None:
    """On a v2 host, and beside the controllers of a v1 host."""
    root = tmp_path / mount
    for path in (".", "user.slice/session-1.scope", *([found] if found else [])):
        group(root, path)
    (root / "cgroup.controllers").write_text("")
    lives = Lives(tmp_path)
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda p, **k: f"2:cpu:/x\n0::{inside}\n" if str(p).endswith("/cgroup") else read(p, **k)
    )
    assert lives.has_pressure
    assert lives._group(os.getpid()) == (root / found if found else None)


def test_a_life_is_looked_up_once_and_again_when_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    now = ME

    def find(name: str, _uuid: str) -> Process:
        looked.append(name)
        return now

    monkeypatch.setattr(vmlife.process, "find", find)
    lives = Lives(tmp_path)
    first = lives.of("a", "u")
    assert first is lives.of("a", "u")
    assert looked == ["a"]
    now = Process(ME.pid, ME.start_time - 1, "boot")
    monkeypatch.setattr(vmlife.process, "start_time", lambda _: ME.start_time - 1)
    second = lives.of("a", "u")
    assert first is not None
    assert second is not None
    assert first.name != second.name
    assert [gone.name for gone in lives.keep(set())] == [second.name]


# --- counters of the processor


@contextmanager
def vcpu(name: str = "CPU 0/TCG") -> Iterator[threading.Event]:
    """A thread of this process that is named like a vCPU's and works until the flag is set."""
    ready, stop = threading.Event(), threading.Event()

    def work() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
        ready.set()
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    try:
        yield stop
    finally:
        stop.set()
        thread.join()


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_vcpu_threads_are_known_by_their_names() -> None:
    assert vcpu_threads(os.getpid()) == []
    with vcpu(), vcpu("CPU 11/KVM"), vcpu("worker"):
        assert len(vcpu_threads(os.getpid())) == 2


def test_counters_follow_the_vcpus() -> None:
    perf = PerfCounters(SOFTWARE)
    if perf.fault:
        pytest.skip(perf.fault)
    before = descriptors()
    assert perf.read("u", ME) is None, "no vCPU, no count"
    with vcpu() as stop:
        first = perf.read("u", ME)
        while (second := perf.read("u", ME)) == first:
            pass
        assert first is not None
        assert second is not None
        assert second.cycles > first.cycles
        stop.set()
    ended = perf.read("u", ME)
    assert ended is not None
    assert ended.cycles >= second.cycles, "a vCPU that was unplugged keeps what it counted"
    with vcpu():
        more = perf.read("u", ME)
        assert more is not None
        assert more.cycles >= ended.cycles
        assert descriptors() == before + 2 * len(SOFTWARE)
        anew = perf.read("u", Process(ME.pid, ME.start_time + 1, "boot"))
        assert anew is not None
        assert descriptors() == before + len(SOFTWARE), "those of the process that ended are closed"
    perf.keep(set())
    assert descriptors() == before


def test_without_counters_it_says_why_and_counts_nothing() -> None:
    """Event 99 is none that a kernel has."""
    perf = PerfCounters(((0, 99),))
    assert perf.fault is not None
    assert perf.fault.startswith("perf_event_open: ")
    with vcpu():
        assert perf.read("u", ME) is None


def test_doctor_says_whether_there_are_counters() -> None:
    finding = counters.probe()
    assert finding.status is (Health.OK if PerfCounters().fault is None else Health.DEGRADED)
    assert (finding.lost is None) == (finding.status is Health.OK)


# --- connections

ARP = """IP address       HW type     Flags       HW address            Mask     Device
10.0.0.2         0x1         0x2         52:54:00:aa:bb:01     *        br0
10.0.0.3         0x1         0x2         52:54:00:AA:BB:01     *        br0
10.0.0.4         0x1         0x0         52:54:00:aa:bb:01     *        br0
10.0.0.5         0x1         0x2         52:54:00:aa:bb:01     *        br1
10.0.0.6         0x1         0x2         52:54:00:aa:bb:02     *        br0
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two taps on br0, and a table of connections that counts by a list of ends."""
    for tap, last in (("tap1", "01"), ("tap2", "02"), ("loose", "03")):
        (tmp_path / tap).mkdir()
        (tmp_path / tap / "address").write_text(f"fe:54:00:aa:bb:{last}\n")
        if tap != "loose":
            (tmp_path / tap / "master").symlink_to("../br0")
    (tmp_path / "arp").write_text(ARP)
    (tmp_path / "count").write_text("3\n")
    monkeypatch.setattr(guestconnections, "_NET", tmp_path)
    monkeypatch.setattr(guestconnections, "_ARP", tmp_path / "arp")
    monkeypatch.setattr(guestconnections, "_COUNT", tmp_path / "count")

    class Table:
        def count(self, addresses: set[str]) -> dict[str, int]:
            assert addresses == {"10.0.0.2", "10.0.0.3", "10.0.0.6"}
            return {"10.0.0.2": 2, "10.0.0.3": 1}

    @contextmanager
    def conntrack() -> Iterator[Table]:
        yield Table()

    monkeypatch.setattr(guestconnections, "conntrack", conntrack)
    return tmp_path


TAPS = {"a": ["tap1"], "b": ["tap2"], "c": ["loose"], "d": []}


def test_connections_are_those_of_a_guests_addresses_on_its_bridge(net: Path) -> None:
    assert Connections().count(TAPS) == {"a": 3, "b": 0}, "c and d have no address that is known"


def test_an_empty_table_is_not_read_and_a_full_one_neither(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guestconnections, "conntrack", None)
    (net / "count").write_text("0")
    assert Connections().count(TAPS) == {"a": 0, "b": 0}
    (net / "count").write_text(str(guestconnections.MOST + 1))
    assert Connections().count(TAPS) == {}
    (net / "count").unlink()
    assert Connections().count(TAPS) == {}
