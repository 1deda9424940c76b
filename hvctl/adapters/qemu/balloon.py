"""The memory balloon after a load of device state: its size and where it moves to are part of that state."""

from __future__ import annotations

from typing import Final

from hvctl.adapters.qemu.inside import Inside
from hvctl.errors import DeadlineError

_SECONDS: Final = 5.0
_PAGE: Final = 4096


def restore(held: Inside, wanted: int, told: int) -> None:
    """A guest that runs has at least the `wanted` bytes of its snapshot, and libvirt knows; told: the bytes that it has
    now, as libvirt heard of them last. DeadlineError: the guest does not move its balloon."""
    actual = held.qmp.execute("query-balloon")["actual"]
    if actual < wanted:  # It moved on since the load.
        _move(held, wanted)
    elif actual == wanted and told != actual:
        # QEMU tells of what a guest does, and a load is nothing that it did: libvirt would show the size from before
        # for good. So the guest gives up one page and gets it back.
        _move(held, actual - _PAGE)
        _move(held, actual)
    # One that has more is left alone: it was on its way down, or has a module that was plugged beside what is promised,
    # and what it uses of that must not be taken.


def _move(held: Inside, size: int) -> None:
    qmp = held.qmp
    qmp.execute("balloon", {"value": size})
    if not qmp.until("BALLOON_CHANGE", lambda: qmp.execute("query-balloon")["actual"] == size, _SECONDS):
        raise DeadlineError(
            f"the balloon of {held.name} did not reach {size} bytes within {_SECONDS:g} s.",
            f"hvctl vm show {held.name}",
        )
