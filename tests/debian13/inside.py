"""Process 1 of the namespaces, in Debian 13, with its own Python: makes hvctl's, or runs the tests with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CHECKOUT, VENV = Path("/srv/hvctl"), Path("/opt/hvctl")
BIN = VENV / "bin"
IMAGES = Path("/var/lib/hvctl/images")


def status_of(*argv: str | Path) -> int:
    """Of a command; whatever lost its parent meanwhile is waited for too, as process 1 has to: libvirt sees a QEMU
    process that nobody waited for as one that refuses to die."""
    process = subprocess.Popen([str(a) for a in argv], cwd=CHECKOUT)
    while True:
        pid, status = os.wait()
        if pid == process.pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode


def must(*argv: str | Path) -> None:
    if status := status_of(*argv):
        print(f"debian13: {' '.join(map(str, argv))} ended with status {status}", flush=True)
        raise SystemExit(1)


def make_python(stamp: Path, digest: str) -> None:
    if stamp.exists() and stamp.read_text() == digest:
        return
    must("rm", "-rf", VENV)
    must(sys.executable, "-m", "venv", VENV)
    install = ("install", "-qq", "--no-cache-dir", "--disable-pip-version-check", "--root-user-action=ignore")
    must(BIN / "pip", *install, "-c", "constraints.txt", "-e", ".[dev,postgresql]")
    must(BIN / "pip", "check", "--disable-pip-version-check")
    stamp.write_text(digest)


def make_images(stamp: Path, digest: str, names: Sequence[str]) -> None:
    if stamp.exists() and stamp.read_text() == digest:
        return
    for name in names:
        must(BIN / "hvctl", "image", "build", name)
    stamp.write_text(digest)


def prepare() -> None:
    print(
        f"debian13: Debian {Path('/etc/debian_version').read_text().strip()}, kernel {os.uname().release}", flush=True
    )
    for tool in (BIN / "python", "libvirtd", "qemu-system-x86_64"):
        must(tool, "--version")
    must(BIN / "hvctl", "image", "list")
    must(BIN / "hvctl", "host", "prepare", "--yes")
    # Its answer about KVM is kept, so that not every module's first VM waits for one. What it finds is shown.
    status_of(BIN / "hvctl", "doctor")


def take_guests(given: str) -> None:
    """The images of the host instead of Debian 13's own, until this ends."""
    if given:
        for own in IMAGES.glob("*-*"):
            must("rm", "-r", own)
        must("cp", "-a", *Path(given).iterdir(), IMAGES)
        must(BIN / "hvctl", "image", "list")


def tests(*arguments: str) -> int:
    # The checkout is read-only.
    return status_of(BIN / "pytest", "-p", "no:cacheprovider", *arguments)


def main() -> int:
    # The terminal tells the tests as well, and they end in order.
    signal.signal(signal.SIGINT, lambda *_: None)
    match sys.argv[1:]:
        case ["make", python_stamp, python, images_stamp, images, *names]:
            make_python(Path(python_stamp), python)
            make_images(Path(images_stamp), images, names)
            return 0
        case ["test", guests, first, *arguments]:
            prepare()
            status = tests(first) if first else 0
            take_guests(guests)
            return tests(*arguments) or status
        case ["shell", guests]:
            prepare()
            take_guests(guests)
            return status_of("bash")
    return 2


if __name__ == "__main__":
    sys.exit(main())
