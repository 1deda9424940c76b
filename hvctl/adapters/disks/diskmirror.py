"""Carries a device over from its stand-in to the disk's own node while the guest runs on, by a block job of QEMU's.

What the guest wrote to the stand-in goes along. libvirt takes no notice of a job whose name it did not give.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from hvctl.adapters.disks.diskseat import Seat
from hvctl.adapters.disks.disksteps import Steps
from hvctl.adapters.qemu.qmp import JOB_ID, own_job
from hvctl.errors import DeadlineError, GuestError

# A guest that writes without end to a disk that it has let go of, as it said, is stopped after this.
PATIENCE_SECONDS: Final = 2.0
STOPPED_SECONDS: Final = 120.0
_OVER: Final = "concluded"


def carry_over(steps: Steps, seat: Seat, running: bool) -> None:
    """The device has its own node after it, with all that the stand-in had. A job that a killed process left is taken
    up. GuestError: the job failed, and the device has the stand-in as before. DeadlineError: repeat it."""
    _Mirror(steps, seat, running).run()


class _Mirror:
    def __init__(self, steps: Steps, seat: Seat, running: bool) -> None:
        self._steps = steps
        self._qmp = steps.qmp
        self._seat = seat
        self._stop = running
        self._resume = False

    def run(self) -> None:
        try:
            if self._job() is None:
                self._start()
            if self._await("ready")["status"] != _OVER:
                self._steps.send([("complete", "job-complete", {"id": JOB_ID})])
            job = self._await(_OVER)
        finally:
            if self._resume:
                self._steps.send([("go-on", "cont", {})])
        self._steps.send([("dismiss", "job-dismiss", {"id": JOB_ID})])
        if "error" in job:
            raise GuestError(f"QEMU's copy of what the guest wrote meanwhile failed: {job['error']}.")

    def _start(self) -> None:
        # Not copy-mode write-blocking: QEMU 7.2 follows no writes until that has begun, and in the mode that is the
        # default it does. Later ones, until "mirror: Fix missed dirty bitmap writes during startup", follow none in
        # either while they read which clusters are there: those of a stand-in are in memory, so nothing comes between.
        arguments = {
            "job-id": JOB_ID,
            "device": self._seat.standin,
            "target": self._seat.nodes[0],
            "sync": "top",
            "auto-dismiss": False,
        }
        self._steps.send([("mirror", "blockdev-mirror", arguments)])

    def _await(self, status: str) -> Mapping[str, Any]:
        """The job when it has come to this, or is over."""
        job = self._reached(status, PATIENCE_SECONDS if self._stop else STOPPED_SECONDS)
        if job is None and self._stop:
            self._stop, self._resume = False, True
            self._steps.send([("halt", "stop", {})])
            job = self._reached(status, STOPPED_SECONDS)
        if job is None:
            raise DeadlineError(
                f"QEMU's copy of what the guest wrote to disk {self._seat.target} meanwhile is not over in time.",
                "hvctl recover",
            )
        return job

    def _reached(self, status: str, seconds: float) -> Mapping[str, Any] | None:
        found: list[Mapping[str, Any]] = []

        def reached() -> bool:
            job = self._job()
            if job is None:
                raise GuestError("QEMU's job vanished: somebody else dismissed it.")
            found.append(job)
            return job["status"] in (status, _OVER)

        return found[-1] if self._qmp.until("JOB_STATUS_CHANGE", reached, seconds) else None

    def _job(self) -> Mapping[str, Any] | None:
        return own_job(self._qmp.execute("query-jobs"))
