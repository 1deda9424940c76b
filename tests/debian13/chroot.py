"""Debian 13 as a folder in the cache: made of the host's own archives with the other release's name, complete or not
there. What has to be made anew is told by digests of what it is made of."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from hvctl.adapters.images.imagepackages import acquire_options, debian_sources

SUITE = "trixie"
CACHE = Path("/var/cache/hvctl")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Where the checkout and hvctl's own Python lie in the folder.
CHECKOUT, VENV = Path("/srv/hvctl"), Path("/opt/hvctl")
IMAGES = ("micro", "debian")
PATIENT = ("nice", "-n", "10")


class NoDebianError(Exception):
    """Debian 13 cannot be had here; the message says why and what to do."""


def sources() -> str:
    """The host's lines of sources.list, for the other release."""
    lines, codename = debian_sources()
    return re.sub(rf"(?m)^(deb \S+ ){codename}\b", rf"\g<1>{SUITE}", lines)


def wanted(packages: Sequence[str]) -> Path:
    """The folder for these packages from these archives."""
    inputs: tuple[str | bytes, ...] = (SUITE, sources(), *sorted(packages), Path(__file__).read_bytes())
    return CACHE / f"debian13-{_digest(inputs)}"


def make(folder: Path, packages: Sequence[str]) -> None:
    """Install Debian 13 into the folder; it has its name only when it is complete, and older ones are removed."""
    if not KEYRING.exists():
        raise NoDebianError(f"{KEYRING} is missing: apt-get install debian-archive-keyring")
    partial = folder.with_name(".debian13.partial")
    for left in (partial, *(p for p in CACHE.glob("debian13-*") if p != folder)):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir()
    # The lists stay: hvctl asks them for the packages of its images.
    made = subprocess.run(
        # In namespaces, so that all that it starts and mounts ends with it.
        [*leash(), *PATIENT, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
         "mmdebstrap", "--mode=root", "--format=directory", "--variant=minbase",
         f"--keyring={KEYRING}", "--skip=cleanup/apt/lists", "--dpkgopt=path-exclude=/usr/share/doc/*",
         "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
         *(f"--aptopt={option}" for option in acquire_options()),
         f"--include={','.join(packages)}", SUITE, str(partial / "root"), "-"],
        input=sources(), text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        raise NoDebianError(f"mmdebstrap cannot make Debian 13; if {KEYRING} lacks its key, upgrade it.")
    (partial / "scratch").mkdir()
    partial.rename(folder)


def leash() -> list[str]:
    """In front of a command: it dies with this process."""
    return ["setpriv", "--pdeathsig", "KILL"]


def stamps(checkout: Path) -> dict[Path, str]:
    """Files in the folder that are written last, and what they hold when what they stand for is up to date."""
    python = [checkout / name for name in ("constraints.txt", "pyproject.toml")]
    images = [p for p in sorted((checkout / "images").rglob("*")) if p.is_file()]
    images += sorted((checkout / "hvctl/adapters/images").glob("*.py"))
    return {
        VENV.with_name("python.stamp"): _digest(p.read_bytes() for p in python),
        VENV.with_name("images.stamp"): _digest(p.read_bytes() for p in (*python, *images)),
    }


def stale(folder: Path, checkout: Path) -> bool:
    def read(stamp: Path) -> str:
        path = folder / "root" / stamp.relative_to("/")
        return path.read_text() if path.exists() else ""

    return any(read(stamp) != digest for stamp, digest in stamps(checkout).items())


def pip_settings(pip: Path) -> tuple[dict[str, str], list[Path]]:
    """The host's configuration of pip as PIP_*, and the files and folders that it names."""
    listed = subprocess.run([pip, "config", "list"], capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"(?m)^(global|install|user|site|:env:)\.([\w-]+)=(.*)$", listed)
    found = {}
    # The environment is first in the list and wins.
    for _, name, value in sorted(lines, key=lambda line: line[0] == ":env:"):
        found[f"PIP_{name.upper().replace('-', '_')}"] = " ".join(str(ast.literal_eval(value)).split())
    reach = re.compile(r"(?i)(https?|no|all)_proxy|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE")
    found |= {name: value for name, value in os.environ.items() if reach.fullmatch(name)}
    words = [word for value in found.values() for word in value.split()]
    paths = {Path(w) for w in words if w.startswith("/")}
    # The pages of an index point to files beside it.
    paths |= {Path(w.removeprefix("file://")).parent for w in words if w.startswith("file:///")}
    return found, sorted(p for p in paths if p.exists() and not paths & set(p.parents))


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8) + data)
    return digest.hexdigest()[:12]
