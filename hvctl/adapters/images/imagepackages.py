"""Debian packages for guest images, from the host's own apt configuration: no archive address is written down here.

The one caller of apt and dpkg. Only the archives that say they are Debian's take part, whatever else the host uses,
and the host's package state is neither read nor changed: every question is asked as if nothing were installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hvctl.adapters.tools import run_tool
from hvctl.errors import HvctlError, RefusedError

_INST = re.compile(r"Inst (\S+) \((\S+) ")
_DEBIAN = ("Debian", "Debian-Security")
_NO_LISTS_HINT = "let apt fetch its lists: apt-get update"


@dataclass(frozen=True, slots=True)
class Package:
    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}={self.version}"


def architecture() -> str:
    return run_tool(["dpkg", "--print-architecture"]).stdout.strip()


def debian_sources() -> tuple[str, str]:
    """The host's Debian archives as sources.list lines, and the release's codename."""
    columns = "$(CREATED_BY)|$(LABEL)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(CODENAME)|$(FILENAME)"
    found: dict[tuple[str, str], dict[str, None]] = {}
    codenames: dict[str, None] = {}
    for line in run_tool(["apt-get", "indextargets", "--format", columns]).stdout.splitlines():
        kind, label, uri, release, component, codename, filename = line.split("|")
        if kind == "Packages" and label in _DEBIAN and Path(filename).exists():
            found.setdefault((uri, release), {})[component] = None
            codenames[codename] = None
    if not found:
        raise RefusedError("apt on this machine has no list of Debian packages to build an image from.", _NO_LISTS_HINT)
    # Updates and security carry the release's codename and a suffix.
    codename = min(codenames, key=len)
    lines = [f"deb {uri} {release} {' '.join(components)}" for (uri, release), components in found.items()]
    return "".join(f"{line}\n" for line in lines), codename


class Archive:
    """The host's Debian archives, asked with a package state of our own that is empty. `work` keeps that state."""

    def __init__(self, work: Path) -> None:
        self.sources, self.codename = debian_sources()
        work.mkdir(parents=True, exist_ok=True)
        (work / "sources.list").write_text(self.sources)
        (work / "status").touch()
        # The caches are switched off because they describe all of the host's sources and belong to the host.
        self._options = [
            f"-oDir::Etc::SourceList={work / 'sources.list'}",
            "-oDir::Etc::SourceParts=/dev/null",
            f"-oDir::State::Status={work / 'status'}",
            "-oDir::Cache::pkgcache=",
            "-oDir::Cache::srcpkgcache=",
            "-oAPT::Install-Recommends=false",
            "-oAPT::Sandbox::User=root",
            "-oDebug::NoLocking=true",
        ]

    def closure(self, wanted: Iterable[str]) -> tuple[Package, ...]:
        """The packages that installing `wanted` (names or apt patterns) on an empty system would bring, by name."""
        names = list(wanted)
        answer = run_tool(
            ["apt-get", *self._options, "--simulate", "--yes", "install", *names], accept=frozenset({0, 100})
        )
        if answer.returncode:
            raise RefusedError(f"apt cannot resolve {' '.join(names)}.", _NO_LISTS_HINT)
        return tuple(
            sorted(
                (Package(m[1], m[2]) for m in map(_INST.match, answer.stdout.splitlines()) if m), key=lambda p: p.name
            )
        )

    def unpack(self, packages: Iterable[Package], work: Path, into: Path) -> None:
        """Download (apt checks what it gets against the signed lists) and unpack without installing."""
        work.mkdir(parents=True, exist_ok=True)
        wanted = [str(p) for p in packages]
        run_tool(["apt-get", *self._options, "--quiet", "download", *wanted], cwd=work)
        files = sorted(work.glob("*.deb"))
        if len(files) != len(wanted):
            raise HvctlError(f"apt downloaded {len(files)} packages instead of {len(wanted)}.")
        into.mkdir(parents=True, exist_ok=True)
        for file in files:
            run_tool(["dpkg-deb", "--extract", file, into])
            file.unlink()


def acquire_options() -> tuple[str, ...]:
    """How the host's apt reaches its archives (proxies, time checks), for a tool that starts an apt of its own."""
    dump = run_tool(["apt-config", "dump", "--no-empty", "--format", "%F %v%n", "Acquire"]).stdout
    kept = re.compile(r"Acquire::(?:https?::.*|Check-Date|Check-Valid-Until|Retries) ")
    return tuple('{} "{}";'.format(*line.split(" ", 1)) for line in dump.splitlines() if kept.match(line))
