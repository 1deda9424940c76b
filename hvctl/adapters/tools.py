"""Runs the command-line tools of the host: one function, so a missing tool and a failed one always read the same."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvctl.errors import DeadlineError, HvctlError, UnreachableError

# The Debian package of each tool, for the hint when it is missing.
_PACKAGES = {
    "apt-cache": "apt",
    "apt-config": "apt",
    "apt-get": "apt",
    "debugfs": "e2fsprogs",
    "dpkg": "dpkg",
    "dpkg-deb": "dpkg",
    "mke2fs": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "qemu-img": "qemu-utils",
}


def run_tool(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str = "",
    seconds: float = 600,
    accept: frozenset[int] = frozenset({0}),
) -> subprocess.CompletedProcess[str]:
    """The finished process with its output as text. It has the ordinary umask: what hvctl's own (077) would do to the
    folders of a daemon or of a guest image shuts QEMU and guests out of them.

    UnreachableError: the tool is not installed; DeadlineError: still running after `seconds` (it is killed);
    HvctlError: it ended with a status that is not in `accept`, with its last words.
    """
    name = Path(argv[0]).name
    try:
        done = subprocess.run(
            [str(a) for a in argv],
            env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
            cwd=cwd,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            umask=0o022,
        )
    except FileNotFoundError as e:
        package = _PACKAGES.get(name)
        hint = f"install it: apt-get install {package}" if package else None
        raise UnreachableError(f"{name} is not installed on this machine.", hint) from e
    except subprocess.TimeoutExpired as e:
        raise DeadlineError(f"{name} was still running after {seconds:g} s and was ended.") from e
    if done.returncode not in accept:
        words = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise HvctlError(f"{name} failed with status {done.returncode}: {words[-1].strip()}.")
    return done
