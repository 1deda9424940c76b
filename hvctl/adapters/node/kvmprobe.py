"""Does a guest really boot under KVM here? /dev/kvm opens on hosts where a guest then hangs, so the micro image is
booted with a deadline, and the answer is kept until the host, its kernel, QEMU or the image changes."""

from __future__ import annotations

import os
import select
import subprocess
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from hvctl import codec
from hvctl.adapters.atomicfile import replace_file
from hvctl.adapters.node.hostpaths import HOST, HostPaths
from hvctl.adapters.tools import run_tool
from hvctl.errors import HvctlError, UnreachableError
from hvctl.model.image import Image
from hvctl.settings import Settings

READY = b"hvctl-ready"
BOOT_SECONDS = 12.0
VERSION_SECONDS = 5.0
MEMORY = 256 << 20


@dataclass(frozen=True, slots=True)
class KvmAnswer:
    """One probe's answer, and everything it depends on."""

    works: bool
    reason: str
    boot_id: str
    host_kernel: str
    qemu_version: str
    image_digest: str
    checked_at: str = ""

    def same_ground(self, other: KvmAnswer) -> bool:
        ground = (self.boot_id, self.host_kernel, self.qemu_version, self.image_digest)
        return ground == (other.boot_id, other.host_kernel, other.qemu_version, other.image_digest)


def kvm_works(settings: Settings, paths: HostPaths = HOST) -> tuple[bool, str]:
    """Whether VMs may use KVM, and why (not). NotFoundError if there is no micro image to boot; the first call on a
    host takes up to 12 s, later ones read the kept answer."""
    from hvctl.adapters.images.imagestore import find

    return kvm_boots(settings, find(settings, "micro"), paths)


def kvm_boots(
    settings: Settings, image: Image, paths: HostPaths = HOST, seconds: float = BOOT_SECONDS
) -> tuple[bool, str]:
    """kvm_works with the image to boot."""
    question = KvmAnswer(
        works=False,
        reason="",
        boot_id=(paths.proc / "sys/kernel/random/boot_id").read_text().strip(),
        host_kernel=os.uname().release,
        qemu_version=qemu_version(paths),
        image_digest=image.digest,
    )
    kept = _kept(settings)
    if kept is not None and kept.same_ground(question):
        return kept.works, kept.reason
    works, reason = _boot(image, paths, seconds)
    answer = replace(question, works=works, reason=reason, checked_at=datetime.now(UTC).isoformat(timespec="seconds"))
    _keep(settings, answer)
    return works, reason


def qemu_version(paths: HostPaths = HOST) -> str:
    """The first line of `qemu-system-x86_64 --version`."""
    return run_tool([paths.qemu, "--version"], seconds=VERSION_SECONDS).stdout.partition("\n")[0].strip()


def answer_file(settings: Settings) -> Path:
    """Where the answer is kept; without it the next question boots a guest again."""
    return Path(settings.state_dir) / "kvm.json"


def _kept(settings: Settings) -> KvmAnswer | None:
    try:
        return codec.load_json(KvmAnswer, answer_file(settings).read_bytes())
    except (OSError, HvctlError):
        return None


def _keep(settings: Settings, answer: KvmAnswer) -> None:
    import json

    try:
        replace_file(answer_file(settings), json.dumps(codec.dump(answer), indent=2) + "\n")
    except OSError as e:
        raise UnreachableError(
            f"{answer_file(settings)} cannot be written: {e.strerror}.", "hvctl host prepare --yes"
        ) from e


def _boot(image: Image, paths: HostPaths, seconds: float) -> tuple[bool, str]:
    command = [
        paths.qemu, "-accel", "kvm", "-cpu", "host", "-machine", "q35", "-m", str(MEMORY >> 20), "-smp", "1",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-sandbox", "on",
        "-kernel", image.kernel, "-initrd", image.initrd, "-append", image.cmdline,
    ]  # fmt: skip
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
    except OSError as e:
        return False, f"{paths.qemu} does not start: {e.strerror}"
    try:
        return _watch(process, seconds)
    finally:
        process.kill()
        process.communicate()


def _watch(process: subprocess.Popen[bytes], seconds: float) -> tuple[bool, str]:
    assert process.stdout is not None
    assert process.stderr is not None
    started = time.monotonic()
    seen = b""
    while (left := started + seconds - time.monotonic()) > 0:
        if not select.select([process.stdout], [], [], left)[0]:
            break
        part = os.read(process.stdout.fileno(), 65536)
        if not part:
            said = process.stderr.read(2000).decode(errors="replace").strip().splitlines()
            return False, f"QEMU ends under KVM: {said[-1] if said else 'it said nothing'}"
        seen = (seen + part)[-65536:]
        if READY in seen:
            return True, f"a guest booted under KVM in {time.monotonic() - started:.1f} s"
    how_far = "its kernel started and got stuck" if b"Linux version" in seen else "its kernel said nothing"
    return False, f"a guest under KVM was not ready within {seconds:g} s: {how_far}"
