"""A copy of this checkout in which a bug can be planted, and what pytest says of tests in it."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.planted.table import Bug

ROOT = Path(__file__).parents[2]
# A bug may have a test wait for ever. Those of a real host have their own idea of that.
EACH_SECONDS = 120
ALL_SECONDS = 1800

_MINUTE = 60 * 10**9
_OPTIONS = ("-q", "--no-header", "--tb=no", "-rfEs", "-p", "no:cacheprovider")
_planted = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Ran:
    """Which of the tests failed, and what else is to be said: pytest did not get as far as running them all."""

    failed: frozenset[str]
    trouble: str = ""


class Checkout:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def copied(cls, folder: Path) -> Checkout:
        """Of all that git knows or would add, as it lies here."""
        argv = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in listed:
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        return cls(folder)

    @contextmanager
    def planted(self, bug: Bug) -> Iterator[None]:
        file = self.folder / bug.file
        text, status = file.read_text(), file.stat()
        file.write_text(bug.planted(text))
        # Python takes what it compiled for right by size and time of the source alone.
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + next(_planted) * _MINUTE))
        try:
            yield
        finally:
            file.write_text(text)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    def run(self, tests: Sequence[str], *, host: bool) -> Ran:
        """A test of several parameters fails with any of them; host: those that need a real host, too. An import that
        fails is no failed test."""
        chosen = (
            ["-m", "not postgresql"] if host else ["-m", "not postgresql and not host", f"--timeout={EACH_SECONDS}"]
        )
        argv = [sys.executable, "-m", "pytest", *_OPTIONS, *chosen, *tests]
        env = {**os.environ, "PYTHONPATH": str(self.folder), "HVCTL_PLANTED": "1"}
        try:
            done = subprocess.run(
                argv, cwd=self.folder, env=env, capture_output=True, text=True, errors="replace", timeout=ALL_SECONDS
            )
        except subprocess.TimeoutExpired:
            return Ran(frozenset(), f"pytest was not at its end after {ALL_SECONDS} s")
        lines = done.stdout.splitlines()
        if done.returncode not in (0, 1):
            said = done.stderr.strip() or done.stdout.strip()
            return Ran(frozenset(), f"pytest ended with status {done.returncode}: {said[-500:]}")
        failed = frozenset(test for test in tests if any(_is_of(line, test) for line in lines))
        others = [line for line in lines if line.startswith(("ERROR", "SKIPPED"))]
        return Ran(failed, others[0] if others else "")


def _is_of(line: str, test: str) -> bool:
    """Whether a line of pytest's summary says that this test failed."""
    said = line.removeprefix("FAILED ")
    return said != line and said.startswith(test) and said[len(test) :][:1] in ("", " ", "[")
