"""Plants one bug after the other in a copy of this checkout, and runs the tests that must notice it: `make planted`.

With names, only those bugs; with --host, those that only real guests notice instead of all others. Exit status 1: a bug
was not noticed; 2: the table does not fit the checkout, or a test fails although nothing is planted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.planted.checkout import ROOT, Checkout
from tests.planted.table import Bug, bugs, problem

WORKERS = 2


def fits(checkout: Checkout, chosen: Sequence[Bug]) -> bool:
    """Whether every entry can be planted, and all tests are green as long as nothing is; prints what is wrong."""
    wrong = [f"{bug.name}: {why}" for bug in chosen if (why := problem(ROOT, bug))]
    if not wrong:
        tests = sorted({test for bug in chosen for test in bug.tests})
        ran = checkout.run(tests, host=any(bug.host for bug in chosen))
        wrong = [f"{test} fails although nothing is planted" for test in sorted(ran.failed)]
        wrong += [ran.trouble] if ran.trouble and not wrong else []
    for line in wrong:
        print(line, file=sys.stderr)
    return not wrong


def noticed(checkout: Checkout, bug: Bug) -> bool:
    """Whether each of its tests failed; prints that."""
    began = time.monotonic()
    with checkout.planted(bug):
        ran = checkout.run(bug.tests, host=bug.host)
    green = [test for test in bug.tests if test not in ran.failed]
    lines = [f"{'SURVIVED' if green else 'caught':8} {time.monotonic() - began:5.1f} s  {bug.name}"]
    lines += [f"{'':18}{bug.effect}"] * bool(green) + [f"{'':18}not noticed by {test}" for test in green]
    lines += [f"{'':18}{ran.trouble}"] * bool(green and ran.trouble)
    print("\n".join(lines), flush=True)
    return not green


def every(folder: Path, chosen: Sequence[Bug], workers: int) -> int | None:
    """How many were noticed; None: nothing could be planted."""
    first = Checkout.copied(folder / "0")
    if not fits(first, chosen):
        return None
    free: SimpleQueue[Checkout] = SimpleQueue()
    free.put(first)
    for number in range(1, workers):
        shutil.copytree(first.folder, folder / str(number))
        free.put(Checkout(folder / str(number)))

    def one(bug: Bug) -> bool:
        checkout = free.get()
        try:
            return noticed(checkout, bug)
        finally:
            free.put(checkout)

    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(one, chosen))


def main() -> int:
    table = bugs()
    parser = argparse.ArgumentParser(prog="python -m tests.planted")
    parser.add_argument("--host", action="store_true", help="those bugs that only real guests notice")
    parser.add_argument("names", nargs="*", metavar="BUG", help="as in tests/planted/bugs.toml")
    asked = parser.parse_args()
    if unknown := set(asked.names) - {bug.name for bug in table}:
        parser.error(f"there is no bug {', '.join(map(repr, sorted(unknown)))}")
    chosen = [b for b in table if (b.name in asked.names if asked.names else b.host == asked.host)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.nice(19)
    # Guests of two runs would wait for each other.
    workers = 1 if any(bug.host for bug in chosen) else WORKERS
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        caught = every(Path(folder), chosen, workers)
    if caught is None:
        return 2
    print(f"caught {caught} of {len(chosen)} in {time.monotonic() - began:.0f} s")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
