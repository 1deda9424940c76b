"""What memory the host still has, as its kernel says."""

from __future__ import annotations

from pathlib import Path

from hvctl.errors import UnreachableError


def available() -> int:
    """Bytes that new pages may take without anything having to be swapped out."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise UnreachableError("/proc/meminfo does not say how much memory is available.")
