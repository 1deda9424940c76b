"""`hvctl host prepare` with libvirt's real daemons, in namespaces of their own that end with the test: nothing runs
before, everything runs after, and a guest keeps running when libvirtd is restarted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hvctl

pytestmark = pytest.mark.host

# A shell stays PID 1, because libvirt waits for its own orphans until somebody reaps them.
ROOM = """
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=0755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=0755 tmpfs /var/lib/libvirt
mkdir -p /var/lib/libvirt/qemu /run/room/log
cp -a /etc/libvirt /run/room/etc
cp -a /var/cache/libvirt /run/room/cache
mount --bind /run/room/etc /etc/libvirt
mount --bind /run/room/cache /var/cache/libvirt
mount --bind /run/room/log /var/log/libvirt
if [ -e /dev/kvm ]; then
    mknod -m 600 /run/room/kvm c 10 232
    mount --bind /run/room/kvm /dev/kvm
fi
sed -i '/^memory_backing_dir/d' /etc/libvirt/qemu.conf
rm -rf /etc/libvirt/qemu
"$@"
exit $?
"""

GUEST = """
<domain type='qemu'><name>hvctl-prepare-NUMBER</name><memory unit='MiB'>32</memory><os><type>hvm</type></os></domain>
"""

SCRIPT = """
import json, os, subprocess, sys
from pathlib import Path
from hvctl.adapters.node.hostprep import apply, changes
from hvctl.settings import Settings

settings = Settings(state_dir="/run/room/state")
seen = {}

def prepare(name):
    seen[name] = []
    for change in changes(settings):
        apply(change)
        seen[name].append(change.name)

def virsh(*words):
    done = subprocess.run(["virsh", "-q", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"virsh {words}: {done.stderr}; {seen}")
    return done.stdout.strip()

prepare("first")
prepare("second")
guest = sys.argv[1]
name = guest.split("name>")[1].split("<")[0]
Path("/run/room/guest.xml").write_text(guest)
virsh("create", "/run/room/guest.xml")
pid, daemon = Path(f"/run/libvirt/qemu/{name}.pid").read_text(), Path("/run/libvirtd.pid").read_text()
os.utime("/etc/libvirt/qemu.conf")
prepare("touched")
seen["state"] = virsh("domstate", name)
seen["same guest"] = Path(f"/run/libvirt/qemu/{name}.pid").read_text() == pid
seen["same daemon"] = Path("/run/libvirtd.pid").read_text() == daemon
# Where anything fails before this, that is what is told; the guest ends with its room in any case.
virsh("destroy", name)
prepare("last")
print(json.dumps(seen))
"""


@pytest.mark.skipif(Path("/proc/1/comm").read_text().strip() == "systemd", reason="systemd starts the daemons here")
def test_a_bare_host_gets_its_daemons_and_a_restart_keeps_the_guests() -> None:
    room = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", ROOM, "room"]
    done = subprocess.run(
        [*room, sys.executable, "-c", SCRIPT, GUEST.replace("NUMBER", str(os.getpid()))],
        env={**os.environ, "PYTHONPATH": str(Path(hvctl.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert [n.split()[0] for n in seen["first"]][-4:] == ["memory_backing_dir", "virtlogd", "libvirtd", "database"]
    assert seen["second"] == []
    assert seen["touched"] == ["libvirtd"]
    assert (seen["state"], seen["same guest"], seen["same daemon"]) == ("running", True, False)
    assert seen["last"] == []
