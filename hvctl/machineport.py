"""The seam to the inside of a QEMU process, under the rules of hvctl.ports: its device state, its RAM, its disks' tags,
and its guest's sign-of-life port."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from hvctl.model.archive import Difference, Hardware
from hvctl.model.snapshot import Binding, Range, Snapshot, StrayTag
from hvctl.model.tracker import Life, Restored, TrackerKind, Tracking
from hvctl.model.vm import Vm

Load = tuple[Snapshot, Sequence[str] | None]
"""The arguments of a load_state: which state, and the disks."""


class Machine(Protocol):
    """The inside of one QEMU process: device state, disks' internal snapshots and guest RAM.

    A process is held from the first call of an operation to release(); every method needs the VM as it was observed,
    and UnreachableError tells that its process is gone. What touches a guest refuses (RefusedError) one that is not
    paused, and a snapshot that does not fit process, devices and disks any more."""

    def release(self) -> None:
        """An operation is over: let go of its process, so that others may have its monitor."""
        ...

    def close(self) -> None: ...

    def binding(self, vm: Vm) -> Binding: ...

    def nodes(self, vm: Vm) -> dict[str, str]:
        """The writable disks by target, with the block node of each; RefusedError if one cannot hold a snapshot."""
        ...

    def room(self, vm: Vm) -> tuple[int, int]:
        """Bytes a snapshot of this VM needs now, and bytes there are for it."""
        ...

    def tracking(self, vm: Vm) -> Tracking | None:
        """What is known of the writes to its RAM; None if nothing was ever noted."""
        ...

    def ready(self, vm: Vm, snapshot: Snapshot | None = None) -> None:
        """Right before a pause, for a reset to `snapshot`: whatever can be opened, asked and refused while the guest
        still runs; RefusedError also of a guest that was asked for a device and has not let it go: a load would take
        it away. Changes nothing, and may be left out."""
        ...

    def pause(self, vm: Vm, load: Load | None = None) -> None:
        """Stop the guest; one that is paused stays so. load: the load_state that it is paused for, of which QEMU then
        hears early."""
        ...

    def resume(self, vm: Vm, *, greet: bool = False, clock: bool = False) -> float:
        """Let it go on; greet: with fresh entropy and the question for a sign of life, and clock: with the time, where
        the VM has a port for it. A guest that runs already is not greeted. When QEMU said that it goes on, in seconds
        of the monotonic clock."""
        ...

    def await_life(self, vm: Vm, seconds: float) -> Life:
        """The answer to the greeting of this operation; DeadlineError without one."""
        ...

    def tell(self, vm: Vm, line: str) -> bool:
        """A line of ASCII, shorter than 512 bytes, for a guest that runs; whether somebody in it took it within a
        second, and not what came of it: never without a port for signs of life. UnreachableError: nobody reads it since
        long."""
        ...

    def hear(self, vm: Vm, line: str, seconds: float) -> bool:
        """Whether a guest that runs says this very line of ASCII, shorter than 128 bytes, on its port for signs of life
        within `seconds`, or has said it since a greeting or another line was heard there; returns as soon as it does.
        All else that it says is thrown away. False at once without a port. GuestError: it floods its port, and is not
        heard any more in this operation. UnreachableError: nobody has the port."""
        ...

    def prepare(self, vm: Vm, snapshot: Snapshot, arm: TrackerKind | None = None) -> None:
        """Its folder and its node for device state, while the guest runs. arm: a tracker is armed next."""
        ...

    def hardware(self, vm: Vm) -> Hardware:
        """The machine that the process shows its guest."""
        ...

    def attach(self, vm: Vm, snapshot: Snapshot) -> None:
        """Give the process the node of a snapshot's device state, which is in its folder already."""
        ...

    def arm(self, vm: Vm, tracker: TrackerKind) -> Tracking:
        """Have writes noted from now on. RefusedError: the tracker that is asked for by name does not work here."""
        ...

    def save_state(self, vm: Vm, snapshot: Snapshot) -> None:
        """Device state and the disks of snapshot.nodes."""
        ...

    def copy_ram(
        self, vm: Vm, snapshot: Snapshot, tracker: TrackerKind = TrackerKind.AUTO, *, live: bool = False
    ) -> int:
        """Bytes stored of what differs from the snapshot's parent. live: while the guest runs; what it writes meanwhile
        is stored again by the call under the pause, which must follow."""
        ...

    def patch_ram(self, vm: Vm, scratch: Snapshot, source: Snapshot, ranges: Sequence[Range] | None) -> int:
        """In the copy that `scratch` has, take these guest-physical ranges (None: all) from `source`; bytes."""
        ...

    def publish(self, snapshot: Snapshot) -> None: ...

    def restore_ram(
        self, vm: Vm, snapshot: Snapshot, tracker: TrackerKind = TrackerKind.AUTO, *, after_load: bool = False
    ) -> Restored:
        """Make guest RAM equal to the snapshot. after_load: the second pass, which takes back what a load touched."""
        ...

    def audit(self, vm: Vm, snapshot: Snapshot) -> int:
        """Pages of guest RAM that are not as in the snapshot, by comparing all; any disables the tracker."""
        ...

    def load_state(self, vm: Vm, snapshot: Snapshot, nodes: Sequence[str] | None = None) -> None:
        """Device state and disks (None: all of the snapshot's). GuestError: the load failed and the machine is dead:
        never continue it."""
        ...

    def prepare_disk(self, vm: Vm, snapshot: Snapshot, target: str, range: Range | None = None) -> None:
        """Make ready what restore_disk puts in; RefusedError if it cannot be had. Nothing of the guest is touched."""
        ...

    def restore_disk(self, vm: Vm, snapshot: Snapshot, target: str, range: Range | None = None) -> dict[str, float]:
        """One disk, or a range of it in bytes, back to the snapshot, whether the guest runs or not. In seconds: `away`
        from the first command that keeps the guest from its old disk until it runs with the one that is back; `paused`
        the same where its vCPUs were stopped for it; each stage. What the guest writes after that is kept."""
        ...

    def disk_is_back(self, vm: Vm, target: str) -> bool:
        """After an interrupted restore_disk: whether finish_disk leaves the disk at the snapshot, and not as it was."""
        ...

    def finish_disk(self, vm: Vm, target: str) -> None:
        """End what an interrupted restore_disk began: forward if the guest has what the disk goes back to, with what it
        wrote there since, else back. A disk that was only prepared, or is done, stays as it is."""
        ...

    def revert_disk(self, vm: Vm, snapshot: Snapshot, target: str) -> None:
        """The image of a disk that is unplugged now becomes what prepare_disk made ready; `vm` is as it was observed
        with the disk. RefusedError: QEMU has the image open, or nothing fitting was prepared."""
        ...

    def disk_is_reverted(self, vm: Vm, snapshot: Snapshot, target: str) -> bool:
        """After an interrupted revert_disk: whether it was done."""
        ...

    def rebind(self, vm: Vm, was: Binding) -> int:
        """Have the VM's snapshots of this process, hidden ones too, fit the block nodes that a disk has since it was
        plugged again; `was` is the binding before it was unplugged. How many changed."""
        ...

    def restore_balloon(self, vm: Vm, snapshot: Snapshot) -> None: ...

    def drop(self, vm: Vm | None, snapshot: Snapshot) -> None:
        """Remove a snapshot, complete or partial: tags, node, files. vm None: its QEMU process is gone. What another
        one builds on stays, hidden, until that one goes."""
        ...

    def snapshots(self, uuid: str | None = None, *, hidden: bool = False) -> Sequence[Snapshot]:
        """Published snapshots (of one VM), oldest first; a corrupt manifest is skipped and is doctor's finding. hidden:
        also those that were deleted while others build on them, and the scratch ones of resets."""
        ...

    def stray_tags(self, vm: Vm) -> Sequence[StrayTag]:
        """What snapshots left in the VM's disks whose RAM is gone, running or not; what cannot be seen is left out."""
        ...

    def drop_tags(self, vm: Vm, tags: Collection[str]) -> Sequence[StrayTag]:
        """Remove those of these tags that are still stray; which they were."""
        ...

    def difference(self, one: Snapshot, other: Snapshot) -> Difference:
        """Where the RAM and the disks of two snapshots of one VM differ."""
        ...
