"""What every benchmark writes: build/bench/NAME.json with the machine, the versions, a flat summary and the cases."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hvctl import __version__

SCHEMA_VERSION = 1


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def spread(values: list[float]) -> dict[str, float]:
    return {
        "n": len(values),
        "min": min(values),
        "median": statistics.median(values),
        "p99": statistics.quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0],
        "max": max(values),
    }


def _version(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.splitlines()[0]


def write(name: str, summary: Mapping[str, float | str], cases: list[dict[str, Any]]) -> None:
    report = {
        "schema_version": SCHEMA_VERSION,
        "machine": {
            "cpus": os.cpu_count(),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "kernel": platform.release(),
            "arch": platform.machine(),
        },
        "versions": {
            "hvctl": __version__,
            "python": platform.python_version(),
            "qemu": _version("qemu-system-x86_64", "--version"),
            "libvirt": _version("virsh", "--version"),
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "summary": summary,
        "cases": cases,
    }
    path = Path(__file__).parent.parent / "build" / "bench" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    say(f"written: {path}")
