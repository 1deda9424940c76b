"""Runs the tests of snapshots and resets on Debian 13's libvirt, QEMU and Python: python -m tests.debian13 [pytest …].

Debian 13 is made once, into /var/cache/hvctl; each run has a copy of it in RAM, in namespaces of its own.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hvctl.adapters.images import imagestore
from hvctl.settings import Settings
from tests.debian13 import chroot, namespace

HERE = Path(__file__).resolve().parent
GUESTS = "/srv/guests"
# One reset is looked at in Debian 13's own guest always. The other tests boot the host's: without KVM a kernel with
# "x86/acpi/boot: Correct acpi_is_processor_usable() check again", which Debian 13's has, takes no plugged vCPU.
OWN = "tests/host/test_command_snapshot.py::test_ram_and_disk_go_back_and_the_process_stays"
NAMES = ("machine", "snapshot", "reset", "part", "trackers", "save", "soak", "truth", "pulse", "real_kills")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.debian13", description=__doc__)
    parser.add_argument("--packages", required=True, help="what is installed into Debian 13")
    parser.add_argument("--checkout", type=Path, default=HERE.parent.parent, help="the hvctl to test")
    parser.add_argument("--guests", choices=("host", "own"), default="host", help="whose images the tests boot")
    parser.add_argument("--shell", action="store_true", help="look around instead of running tests")
    options, arguments = parser.parse_known_args()
    if os.geteuid() != 0:
        parser.error("only root can make Debian 13")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    checkout = options.checkout.resolve()
    # Their server is not needed, only its programs' tests are run elsewhere.
    packages = [p for p in options.packages.split() if p != "postgresql"]
    try:
        with ready(packages, checkout) as folder:
            host = options.guests == "host"
            binds = binds_of(checkout) | (host_images() if host else {})
            guests = GUESTS if host else ""
            if options.shell:
                return enter(folder, binds, ["shell", guests])
            first = OWN if host and not arguments else ""
            return enter(folder, binds, ["test", guests, first, *pytest_arguments(arguments, checkout)])
    except chroot.NoDebianError as e:
        print(f"debian13: {e}", file=sys.stderr)
        return 1


def pytest_arguments(given: Sequence[str], checkout: Path) -> list[str]:
    """The tests of all modules that are about a machine's state, unless others are named."""
    if any((checkout / a.partition("::")[0]).exists() for a in given):
        return list(given)
    found = {p for name in NAMES for p in (checkout / "tests/host").glob(f"test_*{name}*.py")}
    return ["-q", "-m", "host", *given, *sorted(str(p.relative_to(checkout)) for p in found)]


@contextmanager
def ready(packages: Sequence[str], checkout: Path) -> Iterator[Path]:
    """The folder of Debian 13 with hvctl's Python and images, which nobody changes meanwhile."""
    chroot.CACHE.mkdir(mode=0o755, parents=True, exist_ok=True)
    with (chroot.CACHE / "debian13.lock").open("w") as lock:
        while True:
            fcntl.flock(lock, fcntl.LOCK_SH)
            folder = chroot.wanted(packages)
            if folder.exists() and not chroot.stale(folder, checkout):
                yield folder
                return
            fcntl.flock(lock, fcntl.LOCK_EX)
            complete(folder, packages, checkout)


def complete(folder: Path, packages: Sequence[str], checkout: Path) -> None:
    begun = time.monotonic()
    if not folder.exists():
        print(f"debian13: installing {len(packages)} packages and what they need into {folder}", flush=True)
        chroot.make(folder, packages)
        print(f"debian13: installed in {time.monotonic() - begun:.0f} s", flush=True)
    begun = time.monotonic()
    print("debian13: making hvctl's Python and images", flush=True)
    pip, paths = chroot.pip_settings(Path(sys.executable).parent / "pip")
    binds = binds_of(checkout) | {p: p for p in (*paths, Path("/etc/resolv.conf"), Path("/etc/hosts"))}
    stamps = [str(word) for pair in chroot.stamps(checkout).items() for word in pair]
    if enter(folder, binds, ["make", *stamps, *chroot.IMAGES], kept=True, env=pip):
        raise chroot.NoDebianError("hvctl's Python and images could not be made; the reason stands above.")
    print(f"debian13: made in {time.monotonic() - begun:.0f} s", flush=True)


def binds_of(checkout: Path) -> dict[Path, Path | str]:
    return {checkout: chroot.CHECKOUT, HERE: "/srv/debian13"}


def host_images() -> dict[Path, Path | str]:
    """What the host has built, in the one folder that the images themselves name."""
    folders = [Path(imagestore.find(Settings(), name).kernel).parent for name in chroot.IMAGES]
    return {folder: f"{GUESTS}/{folder.name}" for folder in folders}


def enter(
    folder: Path,
    binds: dict[Path, Path | str],
    argv: Sequence[str],
    kept: bool = False,
    env: dict[str, str] | None = None,
) -> int:
    place = namespace.Place(
        root=str(folder / "root"),
        scratch=str(folder / "scratch"),
        kept=kept,
        binds={str(source): str(target) for source, target in binds.items()},
    )
    own = {
        "PATH": f"{chroot.VENV}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/var/cache/hvctl",
        "LANG": "C.UTF-8",
        "TERM": os.environ.get("TERM", "dumb"),
        # The checkout is read-only and the host's Python is another.
        "PYTHONPYCACHEPREFIX": "/var/cache/hvctl/pycache",
        "HYPOTHESIS_STORAGE_DIRECTORY": "/var/cache/hvctl/hypothesis",
        **(env or {}),
    }
    return namespace.run(
        place,
        ["/usr/bin/python3", "/srv/debian13/inside.py", *argv],
        own,
        [*chroot.leash(), *(chroot.PATIENT if kept else ())],
    )


if __name__ == "__main__":
    sys.exit(main())
