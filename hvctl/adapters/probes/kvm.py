"""KVM: by booting a guest under it, and whether libvirt's QEMU may open its device."""

from __future__ import annotations

from hvctl.adapters.node import kvmdevice, kvmprobe
from hvctl.adapters.node.hostpaths import HOST, HostPaths
from hvctl.errors import NotFoundError
from hvctl.model.finding import Finding, degraded, ok
from hvctl.settings import Settings

LOST = "speed: guests run under TCG, QEMU's emulation in software"


def probe(settings: Settings, paths: HostPaths = HOST) -> Finding:
    try:
        works, reason = kvmprobe.kvm_works(settings, paths)
    except NotFoundError as e:
        return degraded("kvm", f"unknown: {e.message.removesuffix('.')}", LOST, e.hint or "hvctl image build micro")
    if works:
        return ok("kvm", reason)
    remedy = f"turn on (nested) virtualisation below this host, then rm {kvmprobe.answer_file(settings)}"
    return degraded("kvm", reason, LOST, remedy)


def device(paths: HostPaths = HOST) -> Finding:
    if (how := kvmdevice.closed(paths.kvm)) is None:
        return ok("kvm-device", f"{paths.kvm} is open to QEMU's user, or not there")
    return degraded(
        "kvm-device",
        f"{paths.kvm} is closed to QEMU's user: {how}",
        "KVM, and libvirt's quick answers: it starts QEMU again at every question about it, for 10 s and more",
        "hvctl host prepare --yes",
        fixable=True,
    )
