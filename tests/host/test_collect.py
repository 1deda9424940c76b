"""What hvctl measures of real VMs beside what their guests' own kernels count, and what becomes of it when libvirtd is
restarted or stands still."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import pytest

import hvctl
from host.outside import Guest, await_true
from host.site import Site
from host.test_prepare import GUEST, ROOM
from hvctl.decide.rates import used
from hvctl.engine.runtime import open_host
from hvctl.model.meter import Reading, VmReading
from hvctl.model.sample import Sample
from hvctl.ports import Host

pytestmark = pytest.mark.host

T = TypeVar("T")
SECTOR = 512


@pytest.fixture(scope="module")
def host(site: Site) -> Iterator[Host]:
    opened = open_host(site.settings)
    with closing(opened.domains), closing(opened.meter), closing(opened.machine):
        yield opened


def of(reading: Reading, guest: Guest) -> VmReading:
    return next(vm for vm in reading.vms if vm.uuid == guest.uuid)


def still(host: Host, guest: Guest, count: Callable[[], T]) -> tuple[VmReading, T]:
    """A reading, and what the guest counted when it was taken: the same before and after it."""
    found: list[tuple[VmReading, T]] = []

    def stood() -> bool:
        before = count()
        seen = of(host.meter.read(), guest)
        found.append((seen, before))
        return before == count()

    await_true(stood, "the guest's counters stand still for a moment")
    return found[-1]


def sample(before: Reading, now: Reading, guest: Guest) -> Sample:
    return next(s for s in used(before, now, float("inf")).samples if s.uuid == guest.uuid)


def busy(guest: Guest) -> float:
    """CPU seconds that the guest's kernel counts as used, over all its vCPUs."""
    user, nice, system, _, _, irq, softirq = map(int, guest.run("head -1 /proc/stat").split()[1:8])
    return (user + nice + system + irq + softirq) / 100


def ran_and_waited(guest: Guest) -> tuple[float, float]:
    """Seconds that the vCPU's thread ran and that it waited for a CPU, as the host's scheduler has them."""
    tasks = Path(f"/proc/{guest.pid}/task").iterdir()
    (thread,) = (t for t in tasks if (t / "comm").read_text().startswith("CPU "))
    ran, waited, _ = (thread / "schedstat").read_text().split()
    return int(ran) / 1e9, int(waited) / 1e9


def test_cpu_is_what_the_guest_counts(host: Host, vm: Guest) -> None:
    """To a tenth, between what the guest got and what it wanted: while the host takes the CPU from it, an emulated
    guest counts some of the ticks as used and misses the others. On a quiet host the two are the same."""
    before, first, (ran, waited) = busy(vm), host.meter.read(), ran_and_waited(vm)
    vm.run("end=$(($(date +%s) + 12)); while [ $(date +%s) -lt $end ]; do :; done")
    second, (ran_then, waited_then), counted = host.meter.read(), ran_and_waited(vm), busy(vm) - before
    found = sample(first, second, vm)
    assert found.steal is not None
    assert found.cpu is not None
    got = sum(cores for _, cores in found.per_vcpu) * found.seconds
    assert got * 0.9 <= counted <= (got + found.steal * found.seconds) * 1.1
    # The host's own figures, which it keeps to 10 ms in the one place and exactly in the other.
    assert got == pytest.approx(ran_then - ran, rel=0.03, abs=0.1)
    assert found.steal * found.seconds == pytest.approx(waited_then - waited, rel=0.03, abs=0.1)
    assert got <= found.cpu * found.seconds + 0.1, "the whole VM is its vCPU and QEMU's own threads"
    assert found.cpu_busiest == found.per_vcpu[0][1]


def test_disk_bytes_and_requests_are_what_the_guest_counts(host: Host, site: Site) -> None:
    with site.created("--start") as guest:
        guest.run("sync; umount /data")

        def count() -> list[int]:
            return [int(f) for f in guest.run("cat /sys/block/vda/stat").split()]

        before, counted = still(host, guest, count)
        guest.run("dd if=/dev/zero of=/dev/vda bs=64k count=100; sync; echo 3 > /proc/sys/vm/drop_caches")
        guest.run("dd if=/dev/vda of=/dev/null bs=4k count=777; dd if=/dev/vda of=/dev/null bs=512 skip=90000 count=3")
        after, more = still(host, guest, count)
        (old,), (new,) = before.disks or (), after.disks or ()
        reads, read_sectors, writes, written_sectors = (more[i] - counted[i] for i in (0, 2, 4, 6))
        assert new.write_bytes - old.write_bytes == written_sectors * SECTOR
        assert new.read_bytes - old.read_bytes == read_sectors * SECTOR
        assert written_sectors * SECTOR == 100 * 65536
        assert read_sectors * SECTOR >= 777 * 4096
        assert (new.reads - old.reads, new.writes - old.writes) == (reads, writes)


def test_network_bytes_and_packets_are_what_the_guest_counts(host: Host, site: Site, vm: Guest) -> None:
    """rx is what the guest received."""
    vm.run("ip link set eth0 up; ip addr add 10.213.7.2/24 dev eth0")
    subprocess.run(["ip", "addr", "add", "10.213.7.1/24", "dev", site.bridge], check=True)
    try:
        names = ("rx_bytes", "tx_bytes", "rx_packets", "tx_packets")
        script = "; ".join(f"cat /sys/class/net/eth0/statistics/{name}" for name in names)

        def count() -> list[int]:
            return [int(n) for n in vm.run(script).split()]

        before, counted = still(host, vm, count)
        vm.run("ping -c 20 -i 0.1 -s 1000 10.213.7.1")
        vm.run("for i in 1 2 3; do echo much | nc -u -w 1 10.213.7.1 9; done; true")
        after, more = still(host, vm, count)
        (old,), (new,) = before.nics or (), after.nics or ()
        assert [b - a for a, b in zip(old[1:], new[1:], strict=True)] == [
            b - a for a, b in zip(counted, more, strict=True)
        ]
        assert more[0] - counted[0] >= 20 * 1042
        assert more[1] - counted[1] >= 20 * 1042
        if Path("/proc/sys/net/netfilter/nf_conntrack_count").exists():
            assert after.connections is not None, "the host knows an address of the guest"
    finally:
        subprocess.run(["ip", "addr", "del", "10.213.7.1/24", "dev", site.bridge], check=True)
        vm.run("ip addr del 10.213.7.2/24 dev eth0")


def test_memory_is_what_the_guest_counts(host: Host, vm: Guest) -> None:
    """As it said when the balloon driver reported last, some seconds ago."""
    names = ("MemTotal", "MemFree", "MemAvailable")
    total, free, usable = (int(vm.run(f"awk '/^{n}:/ {{print $2}}' /proc/meminfo")) << 10 for n in names)
    await_true(lambda: of(host.meter.read(), vm).available is not None, "the guest has reported")
    seen = of(host.meter.read(), vm)
    assert seen.available == total
    assert seen.unused == pytest.approx(free, abs=8 << 20)
    assert seen.usable == pytest.approx(usable, abs=8 << 20)
    resident = int(Path(f"/proc/{vm.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert seen.rss == pytest.approx(resident, rel=0.1)


def test_how_old_a_process_is_and_which(host: Host, vm: Guest) -> None:
    seen = of(host.meter.read(), vm)
    ticks = int(Path(f"/proc/{vm.pid}/stat").read_text().rpartition(")")[2].split()[19])
    assert seen.life.startswith(f"{vm.pid}:{ticks}:")
    age = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    assert seen.uptime == pytest.approx(age, abs=2.0)


WRITER = r"""
cat > /run/writer <<'END'
while ! [ -e /run/stop ]; do
    for c in a b; do
        dd if=/dev/zero bs=64k count=640 | tr '\000' $c > /run/dirt
        echo $c > /run/round
    done
done
END
setsid sh /run/writer > /dev/null 2>&1 < /dev/null &
"""


def test_a_guest_that_writes_dirties_more_than_an_idle_one(host: Host, vm: Guest) -> None:
    """QEMU samples pages and compares what is in them: each round writes something else to the same 40 MiB."""
    idle = host.meter.dirty_rate(vm.uuid, 2)
    vm.run(WRITER)
    try:
        await_true(lambda: vm.run("cat /run/round 2> /dev/null || true") != "", "the guest has written once")
        await_true(lambda: int(vm.run("stat -c %s /run/dirt")) > 1 << 20, "and it was much")
        await_true(lambda: host.meter.dirty_rate(vm.uuid, 4) > max(idle, 1 << 20), "it is seen to write")
    finally:
        vm.run("touch /run/stop; while pidof tr > /dev/null; do sleep 0.1; done; rm -f /run/dirt")


def test_a_daemon_measures_beside_the_command(site: Site, vm: Guest) -> None:
    """The daemon as a process: its samples are of this VM, and what changes things is paused on a host of others."""
    site.ok("job", "pause")
    daemon = site.spawn("node", "run", env={"HVCTL_COLLECT_INTERVAL": "1"})
    query = "select count(*) from raw_sample s join observed_vm v on v.id = s.vm where v.uuid = ?"
    try:
        await_true(lambda: Path(site.settings.run_dir, "node.lock").exists(), "the daemon has its lock")
        await_true(lambda: bool(site.journal("select name from sqlite_master where name = 'raw_sample'")), "tables")
        await_true(lambda: site.journal(query, vm.uuid)[0] >= 2, "there are samples")
        assert f"(pid {daemon.pid})" in site.refused(7, "node", "run", "--once")
        (line,) = [v for v in site.json("top", "-n", "1") if v["uuid"] == vm.uuid]
        assert line["used"]["cpu"] > 0
        assert line["promised"]["memory"] == 256 << 20
    finally:
        daemon.terminate()
        _, said = daemon.communicate(timeout=60)
    assert daemon.returncode == 0, said
    assert "hardware counters" in said or Path("/sys/bus/event_source/devices/cpu").exists()
    assert {j["name"] for j in site.json("job", "list") if j["paused"]} >= {"recover", "reconcile"}


# --- libvirtd comes and goes, in namespaces of its own

SCRIPT = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from hvctl.adapters.node.hostprep import apply, changes
from hvctl.decide.rates import happened, used
from hvctl.engine.runtime import open_host
from hvctl.errors import DeadlineError, UnreachableError
from hvctl.settings import Settings

settings = Settings(state_dir="/run/room/state", libvirt_deadline=3.0)
for change in changes(settings):
    apply(change)
name = sys.argv[1].split("name>")[1].split("<")[0]
Path("/run/room/guest.xml").write_text(sys.argv[1])

def virsh(*words):
    subprocess.run(["virsh", "-q", *words], check=True, capture_output=True)

def libvirtd():
    return int(Path("/run/libvirtd.pid").read_text())

def read():
    while True:
        try:
            return host.meter.read()
        except (DeadlineError, UnreachableError) as e:
            seen.setdefault("faults", []).append(type(e).__name__)
            if len(seen["faults"]) > 40:
                raise
            time.sleep(1)

seen = {}
virsh("create", "/run/room/guest.xml")
try:
    host = open_host(settings)
    first = read()
    daemon = libvirtd()
    os.utime("/etc/libvirt/qemu.conf")
    for change in changes(settings):
        apply(change)
    seen["another daemon"] = libvirtd() != daemon
    second = read()
    seen["faults of a restart"] = seen.pop("faults", [])
    seen["events"] = len(happened(first, second))
    # A first call may wait until libvirtd is ready, and what took long is a gap, unless much time lies between.
    time.sleep(4)
    later = read()
    found = used(first, later, 999)
    seen["samples"] = [found.gap, *((s.name, s.cpu is not None and s.cpu >= 0) for s in found.samples)]
    os.kill(libvirtd(), signal.SIGSTOP)
    began = time.monotonic()
    try:
        host.meter.read()
    except DeadlineError:
        seen["stopped"] = time.monotonic() - began
    began = time.monotonic()
    try:
        host.meter.read()
    except DeadlineError as e:
        seen["again"] = [time.monotonic() - began, e.message]
    os.kill(libvirtd(), signal.SIGCONT)
    third = read()
    seen["after"] = [vm.name for vm in third.vms]
    seen["same life"] = len({r.vms[0].life for r in (first, second, third)}) == 1
    host.meter.close()
    host.domains.close()
finally:
    virsh("destroy", name)
print(json.dumps(seen))
"""


@pytest.mark.skipif(Path("/proc/1/comm").read_text().strip() == "systemd", reason="systemd starts the daemons here")
def test_a_libvirtd_that_is_restarted_or_stands_still_costs_a_cycle() -> None:
    name = f"hvctl-collect-{os.getpid()}"
    room = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", ROOM, "room"]
    done = subprocess.run(
        [*room, sys.executable, "-c", SCRIPT, GUEST.replace("hvctl-prepare-NUMBER", name)],
        env={**os.environ, "PYTHONPATH": str(Path(hvctl.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    assert seen["another daemon"]
    assert (seen["faults of a restart"], seen["events"]) == ([], 0), "it connects again within the call"
    assert seen["samples"] == [None, [name, True]]
    assert 3.0 <= seen["stopped"] < 10.0
    assert seen["again"][0] < 1.0, "one stuck look is not joined by others"
    assert "has not ended the last look" in seen["again"][1]
    assert (seen["after"], seen["same life"]) == ([name], True)
