"""Domains that somebody defined with virsh and hvctl knows nothing of."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from host.outside import Guest, virsh
from host.site import Site
from hvctl.adapters.images import imagestore

# With what hvctl does not know and must keep: an element of another tool's and a title.
_DOMAIN = """
<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <title>Somebody's own</title>
  <metadata><note:note xmlns:note='urn:somebody'>do not lose</note:note></metadata>
  <memory unit='MiB'>256</memory>
  <vcpu current='1'>2</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type>{boot}</os>
  <features><acpi/></features>
  <devices>
    <controller type='usb' model='none'/>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='{disk}'/><target dev='vda' bus='virtio'/>
      <serial>data</serial>
    </disk>
    <interface type='bridge'><source bridge='{bridge}'/><model type='virtio'/></interface>
    <serial type='pty'/>
    <video><model type='none'/></video>
    <memballoon model='{balloon}'/>
  </devices>
</domain>
"""


@contextmanager
def foreign(site: Site, boots: bool = True, balloon: str = "virtio") -> Iterator[Guest]:
    """Defined, not started. One that does not boot has no kernel: its balloon's driver never comes."""
    name, identity = site.name(), str(uuid.uuid4())
    disk = Path(site.settings.state_dir, f"{name}.qcow2")
    image = imagestore.find(site.settings, "micro")
    boot = f"<kernel>{image.kernel}</kernel><initrd>{image.initrd}</initrd><cmdline>{image.cmdline}</cmdline>"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "64M"], check=True)
    xml = _DOMAIN.format(
        name=name, uuid=identity, boot=boot if boots else "", disk=disk, bridge=site.bridge, balloon=balloon
    )
    virsh("define", "/dev/stdin", stdin=xml)
    guest = Guest(name, identity)
    try:
        yield guest
    finally:
        if guest.state != "shut off":
            virsh("destroy", identity)
        virsh("undefine", identity)
        # What adopt made for its monitor is the foreign VM's owner's to remove: doctor names it.
        shutil.rmtree(site.settings.vms_dir / identity, ignore_errors=True)
        disk.unlink()
