"""What a guest of Debian's image does for hvctl beyond what every guest does: it says that it is ready for its
interruption, and as a CI runner it has a shipped policy empty its scratch disk before that is full."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from host.outside import Guest, await_true, virsh
from host.site import Site, copy_image
from host.test_command_interrupt import ALONE, LEAVE
from hvctl.engine.operate import Engine
from hvctl.operations import guard

pytestmark = pytest.mark.host

SECONDS = 120.0
FASTER = 5
"""Seconds that pass for the guard in one of the guest: its policy thinks in minutes."""
GRACE = 100.0
# All that it may have, so that of what its policy allows only the disk is left to be done.
SIZE = ("--memory", "256MiB", "--max-memory", "256MiB")
HOOK = """mkdir -p /etc/hvctl/notice.d
printf '#!/bin/sh\\nexec hvctl-ready\\n' > /etc/hvctl/notice.d/ready
chmod 755 /etc/hvctl/notice.d/ready"""
# As snapshots/README.md has it for ci-scratch: a label, a mount point, and `sync` before the snapshot.
SCRATCH = """for disk in /sys/block/vd*; do [ "$(cat $disk/serial)" != scratch ] || name=${disk##*/}; done
mke2fs -q -t ext4 -L scratch /dev/$name
mkdir -p /scratch && mount LABEL=scratch /scratch && mkdir /scratch/work && sync"""
# What finds the disk full says so; that it is away for a moment is another matter.
JOB = """cat > /run/job << 'END'
i=0
while :; do
    dd if=/dev/zero of=/scratch/work/$i bs=1M count=2 conv=fsync 2> /run/said
    ! grep -q 'No space left' /run/said || touch /run/full
    i=$((i + 1)); sleep 0.3
done
END
sh /run/job > /run/job.log 2>&1 & echo $! > /run/job.pid"""


@pytest.fixture(scope="module")
def debian(site: Site) -> Iterator[Guest]:
    copy_image(site.settings, "debian")
    disks = ("--disk", "data:64MiB", "--disk", "scratch:96MiB")
    with site.created("--image", "debian", *SIZE, *disks, "--start") as guest:
        assert "Debian" in guest.run("cat /etc/os-release")
        yield guest


def notified(site: Site, guest: Guest, grace: float) -> Any:
    """What came of the notice; the guest is back after it."""
    done = site.json("interrupt", guest.name, "--how", "pause", "--grace", str(grace))["operations"][0]
    assert guest.state == "paused"
    site.ok("resume", guest.name)
    (told,) = (s for s in done["steps"] if s["name"] == "notify_guest")
    assert (told["seconds"] < grace) == told["facts"]["ready"]
    return told["facts"]


def test_it_says_that_it_is_ready(site: Site, debian: Guest) -> None:
    """From a program that its agent runs, and without an agent on its port, there for the right interruption only."""
    site.ok("vm", "set", debian.name, "--interruptible")
    debian.run(HOOK)
    assert notified(site, debian, GRACE) == {"told": True, "by": ["line", "document"], "ready": True}
    debian.run(f"rm /etc/hvctl/notice.d/ready; {ALONE}")
    virsh("qemu-agent-command", debian.uuid, LEAVE)
    await_true(lambda: not debian.answers(), "the agent is gone")
    for grace, ready in ((1.0, False), (GRACE, True)):
        assert notified(site, debian, grace) == {"told": True, "by": ["line"], "ready": ready}
    debian.await_answer()
    site.ok("vm", "set", debian.name, "--no-interruptible")


def test_a_ci_runner_whose_scratch_disk_fills(
    site: Site, engine: Engine, debian: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, began = debian.pid, time.time()
    monkeypatch.setattr(engine, "clock", lambda: began + (time.time() - began) * FASTER)
    debian.run(SCRATCH)
    site.ok("snapshot", "take", debian.name, "clean")
    site.ok("guard", debian.name, "--policy", "ci-scratch")
    debian.run(JOB)
    until = time.monotonic() + SECONDS
    while "disk:scratch" not in (acted := parts(engine, debian)):
        assert "full" not in debian.run("ls /run"), acted
        assert time.monotonic() < until, acted
        guard.cycle(engine)
    debian.run("kill $(cat /run/job.pid)")
    assert "full" not in debian.run("ls /run")
    assert "ext4" in debian.run("grep ' /scratch ' /proc/mounts")
    assert debian.pid == process
    site.ok("guard", debian.name, "--off")
    site.ok("snapshot", "delete", debian.name, "clean")


def parts(engine: Engine, guest: Guest) -> list[str]:
    """Those that were reset."""
    made = engine.store.guards.of_vm(engine.facts.name, guest.uuid)
    return [d.decision.chosen.part for d in made if d.decision.chosen and d.outcome == "done"]
