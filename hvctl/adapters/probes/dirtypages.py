"""Can this kernel tell which pages of another process were written? Each way is tried with known writes, because a
kernel without soft-dirty accepts the request and then reports every page as clean."""

from __future__ import annotations

from collections.abc import Callable

from hvctl.adapters.node.hostpaths import HOST, HostPaths
from hvctl.adapters.probes.trackers import Child, SoftDirty, Tracker, Userfault, child
from hvctl.errors import HvctlError
from hvctl.model.finding import Finding, degraded, ok

ROUNDS = ((), (3, 7, 8, 200), (0, 255), ())

MakeTracker = Callable[[Child, HostPaths], Tracker]


def _fault(make: MakeTracker, paths: HostPaths) -> str | None:
    """What is wrong with a tracker, None if it sees exactly the pages that were written, round after round."""
    try:
        with child() as process:
            tracker = make(process, paths)
            try:
                tracker.arm()
                for pages in ROUNDS:
                    process.write(pages)
                    seen = tracker.collect()
                    if seen != pages:
                        return f"pages {_shown(pages)} were written and {_shown(seen)} were seen"
            finally:
                tracker.close()
    except HvctlError as e:
        return e.message.removesuffix(".")
    except OSError as e:
        return f"{e.filename}: {e.strerror}" if e.filename else str(e)
    return None


def _shown(pages: tuple[int, ...]) -> str:
    if len(pages) > 8:
        return f"{len(pages)} pages"
    return ", ".join(map(str, pages)) or "none"


def userfaultfd(paths: HostPaths = HOST, make: MakeTracker = Userfault) -> Finding:
    """userfaultfd write protection and PAGEMAP_SCAN: what makes a reset's cost follow the pages that changed."""
    fault = _fault(make, paths)
    if fault is None:
        return ok("userfaultfd", "written pages of another process are seen exactly, and armed again in one call")
    return degraded(
        "userfaultfd",
        fault,
        "fast warm resets: all guest RAM is compared with the snapshot instead",
        "boot a kernel of 6.7 or newer and run hvctl as root",
    )


def soft_dirty(paths: HostPaths = HOST, make: MakeTracker = SoftDirty) -> Finding:
    """Soft-dirty bits: the second choice where userfaultfd cannot be used."""
    fault = _fault(make, paths)
    if fault is None:
        return ok("soft-dirty", "written pages of another process are seen exactly")
    return degraded(
        "soft-dirty",
        f"unavailable: {fault}",
        "the second choice of tracker, where userfaultfd does not work: all guest RAM is compared instead",
        "nothing while userfaultfd is ok; otherwise boot a kernel with CONFIG_MEM_SOFT_DIRTY",
    )
