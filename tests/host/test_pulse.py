"""The sign of life of real guests across real resets: at once, with the right nonce only, and whatever the guest does.

hvctl leaves a VM paused that was paused before a reset, so each test lets its guest go on by itself.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest

from host.outside import Guest, await_true, virsh
from host.site import Site
from hvctl.adapters.guest.pulse import ENTROPY, Done, Pulse, discard, ends, new_nonce
from hvctl.errors import DeadlineError, GuestError

pytestmark = pytest.mark.host

PORT = "org.hvctl.pulse.0"
SECONDS = 60.0
PROGRAM = "$(pidof hvctl-answer)"


@pytest.fixture
def path(vm: Guest) -> str:
    await_true(lambda: vm.run("pidof hvctl-answer || true") != "", "the guest's program runs")
    (source,) = vm.xml().findall("devices/channel[@type='pipe']/source")
    return source.get("path", "")


@contextmanager
def snapshot(site: Site, vm: Guest) -> Iterator[None]:
    site.ok("snapshot", "take", vm.name, "s")
    try:
        yield
    finally:
        if vm.state == "paused":
            virsh("resume", vm.uuid)
        site.ok("snapshot", "delete", vm.name, "s")


def reset_paused(site: Site, vm: Guest) -> None:
    if vm.state == "running":
        virsh("suspend", vm.uuid)
    site.ok("reset", vm.name, "--to", "s")
    assert vm.state == "paused"


def greeted(vm: Guest, path: str, time_ns: int | None = None) -> Done:
    """A paused guest goes on, and answers."""
    with Pulse(path) as pulse:
        nonce = new_nonce()
        pulse.send(nonce, os.urandom(ENTROPY), time_ns)
        virsh("resume", vm.uuid)
        pulse.await_life(nonce, SECONDS)
        return pulse.await_done(nonce, SECONDS)


def port(vm: Guest) -> str:
    """The guest's own device."""
    names = vm.run("grep -H . /sys/class/virtio-ports/*/name").splitlines()
    (found,) = (line.split("/")[4] for line in names if line.endswith(f":{PORT}"))
    return f"/dev/{found}"


def quiet(vm: Guest, path: str) -> None:
    """Of a paused guest that flooded its port."""
    while discard(path):
        vm.qmp("query-status")


def test_a_guest_shows_life_after_each_of_many_resets(site: Site, vm: Guest, path: str) -> None:
    """And has taken entropy and time by then: its clock is the host's, its random numbers are others each time."""
    vm.run("date -s @1000000000")
    with snapshot(site, vm):
        seen = set()
        for _ in range(8):
            reset_paused(site, vm)
            asked = time.time()
            assert greeted(vm, path, time.time_ns()) == Done(reseeded=True, clock_set=True)
            vm.await_answer()
            now, number = vm.run("date +%s; head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '").split()
            assert int(asked) - 1 <= int(now) <= time.time() + 1
            seen.add(number)
        assert len(seen) == 8


def test_without_a_time_the_guests_clock_stays(site: Site, vm: Guest, path: str) -> None:
    vm.run("date -s @1000000000")
    virsh("suspend", vm.uuid)
    assert greeted(vm, path) == Done(reseeded=True, clock_set=False)
    assert vm.run("date +%s").startswith("100000")
    vm.run(f"date -s @{int(time.time())}")


def test_a_line_from_before_the_snapshot_is_no_life(site: Site, vm: Guest, path: str) -> None:
    """The guest's program is stopped with a whole line and half of one unread, so each reset brings both back."""
    vm.run(f"kill -STOP {PROGRAM}")
    stale = new_nonce()
    virsh("suspend", vm.uuid)
    with Pulse(path) as pulse:
        pulse.send(stale, os.urandom(ENTROPY))
        virsh("resume", vm.uuid)
    into = os.open(ends(path)[0], os.O_WRONLY | os.O_NONBLOCK)
    os.write(into, b"\nlife 0123456789")
    os.close(into)
    await_true(lambda: pending(path, 0) == 0, "QEMU has taken both")
    with snapshot(site, vm):
        for _ in range(3):
            reset_paused(site, vm)
            with Pulse(path) as pulse:
                fresh = new_nonce()
                pulse.send(fresh, os.urandom(ENTROPY))
                virsh("resume", vm.uuid)
                # Nothing answers while the program is stopped: neither the nonce of now, nor one that was never sent.
                with pytest.raises(DeadlineError):
                    pulse.await_life(fresh, 0.2)
                vm.await_answer()
                vm.run(f"kill -CONT {PROGRAM}")
                pulse.await_life(fresh, SECONDS)
                assert pulse.await_done(fresh, SECONDS).reseeded
        # Without a line of now, what the guest finds from before is answered with its old nonce.
        reset_paused(site, vm)
        with Pulse(path) as pulse:
            virsh("resume", vm.uuid)
            vm.await_answer()
            vm.run(f"kill -CONT {PROGRAM}")
            pulse.await_life(stale, SECONDS)
            with pytest.raises(DeadlineError):
                pulse.await_life(new_nonce(), 0.2)
    vm.run(f"kill -CONT {PROGRAM} || true")


def pending(path: str, end: int) -> int:
    """Bytes in a FIFO."""
    descriptor = os.open(ends(path)[end], os.O_RDONLY | os.O_NONBLOCK)
    try:
        answer = fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))
    finally:
        os.close(descriptor)
    return int(struct.unpack("i", answer)[0])


def test_a_guest_that_does_not_listen_costs_a_deadline_and_nothing_else(site: Site, vm: Guest, path: str) -> None:
    with without_program(vm):
        for _ in range(3):
            virsh("suspend", vm.uuid)
            with Pulse(path) as pulse:
                nonce = new_nonce()
                pulse.send(nonce, os.urandom(ENTROPY))
                virsh("resume", vm.uuid)
                with pytest.raises(DeadlineError):
                    pulse.await_life(nonce, 0.2)
            # It stays in the FIFO, and the next session throws it away.
            assert pending(path, 0) == 189
            assert frontend_open(vm) is False
        vm.await_answer()
    virsh("suspend", vm.uuid)
    assert greeted(vm, path).reseeded


def frontend_open(vm: Guest) -> bool:
    """Whether the guest has the port open, as QEMU knows it."""
    (alias,) = vm.xml().findall("devices/channel[@type='pipe']/alias")
    (only,) = (c for c in vm.qmp("query-chardev") if c["label"] == f"char{alias.get('name')}")
    return bool(only["frontend-open"])


@contextmanager
def without_program(vm: Guest) -> Iterator[None]:
    """Nothing in the guest has the port open."""
    vm.run("cp /etc/inittab /run/inittab; sed -i /hvctl-pulse/d /etc/inittab; kill -HUP 1")
    # The shell that waits for the program would only sleep: init starts neither again.
    vm.run("kill $(pidof hvctl-pulse) || true; killall hvctl-answer; killall hvctl-pulse 2>/dev/null || true")
    vm.run("until ! pidof hvctl-answer; do sleep 0.1; done > /dev/null")
    try:
        yield
    finally:
        vm.run("cp /run/inittab /etc/inittab; kill -HUP 1; until pidof hvctl-answer; do sleep 0.1; done > /dev/null")


def test_a_guest_that_floods_its_port_harms_nobody(site: Site, vm: Guest, path: str) -> None:
    with without_program(vm):
        device = port(vm)
        vm.run(f"(yes flood > {device} 2> /dev/null & echo $! > /run/flood) > /dev/null 2>&1")
        await_true(lambda: pending(path, 1) == 1 << 16, "the FIFO is full")
        assert vm.qmp("query-status")["status"] == "running"
        virsh("suspend", vm.uuid)
        # Its buffers are empty in the snapshot, so that QEMU has nothing to write into guest RAM after a load.
        quiet(vm, path)
        assert pending(path, 1) == 0
        site.ok("snapshot", "take", vm.name, "s")
        virsh("resume", vm.uuid)
        try:
            for _ in range(3):
                await_true(lambda: pending(path, 1) == 1 << 16, "the FIFO is full again")
                reset_paused(site, vm)
                with Pulse(path) as pulse:
                    nonce = new_nonce()
                    pulse.send(nonce, os.urandom(ENTROPY))
                    virsh("resume", vm.uuid)
                    with pytest.raises(GuestError, match="floods"):
                        pulse.await_life(nonce, SECONDS)
                # The port's ring is whole: the rest of the device, the agent's port, works.
                vm.await_answer()
                assert vm.run("kill -0 $(cat /run/flood) && echo alive") == "alive\n"
            vm.run("kill $(cat /run/flood)")
        finally:
            if vm.state == "paused":
                virsh("resume", vm.uuid)
            site.ok("snapshot", "delete", vm.name, "s")
    virsh("suspend", vm.uuid)
    quiet(vm, path)  # of the flood that the port still held
    assert greeted(vm, path).reseeded


def test_a_reset_does_not_close_the_port_for_the_guest(site: Site, vm: Guest, path: str) -> None:
    """The program sees nothing of a reset but its line: it is the same process, which was never told of an end."""
    program = vm.run("pidof hvctl-answer")
    with snapshot(site, vm):
        for _ in range(3):
            reset_paused(site, vm)
            greeted(vm, path)
            assert frontend_open(vm)
            vm.await_answer()
            assert vm.run("pidof hvctl-answer") == program


def test_a_vm_without_the_port_is_reset_as_ever(site: Site) -> None:
    """One that was created before there was such a port."""
    guest = site.create()
    try:
        root = guest.xml(inactive=True)
        devices = root.find("devices")
        assert devices is not None
        for channel in devices.findall("channel[@type='pipe']"):
            devices.remove(channel)
        virsh("define", "/dev/stdin", stdin=ElementTree.tostring(root, encoding="unicode"))
        for end in ends(str(guest.overlays()[0].parent / "pulse")):
            Path(end).unlink()
        site.ok("vm", "start", guest.name)
        guest.await_boot()
        guest.mark("old")
        site.ok("snapshot", "take", guest.name, "s")
        guest.mark("new")
        done = json.loads(site.ok("-f", "json", "reset", guest.name, "--to", "s"))["operation"]
        assert done["result"]["warmth"] == "warm"
        assert guest.marks() == ("old", "old")
    finally:
        site.ok("vm", "delete", guest.name, "--force")
