"""The kernel's traffic control and the disk files of a fake host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hvctl.adapters.fake import inner
from hvctl.adapters.fake.file import WorldFile
from hvctl.adapters.fake.state import File, Ifb, Part
from hvctl.adapters.network.shaping import bucket, ifb_name
from hvctl.errors import NotFoundError, RefusedError
from hvctl.model.allocation import NicLimit
from hvctl.model.archive import Placement
from hvctl.model.flows import Forgotten
from hvctl.model.vm import Disk, Nic, Space, VmSpec

MTU = 1500


class FakeNetwork:
    def __init__(self, file: WorldFile) -> None:
        self._file = file

    def bridge(self, name: str) -> bool:
        with self._file.call("bridge", looks=True) as world:
            return name in world.bridges

    def limit(self, tap: str, mac: str) -> NicLimit:
        with self._file.call("limit", looks=True) as world:
            device = world.taps.get(tap)
            return NicLimit(mac, device.inbound, device.outbound) if device else NicLimit(mac)

    def foreign(self, tap: str) -> str | None:
        with self._file.call("foreign", looks=True) as world:
            return world.taps[tap].foreign if tap in world.taps else None

    def set_limit(self, tap: str, limit: NicLimit, owner: str) -> None:
        self._set("set_limit", tap, limit, owner)

    def rebuild(self, tap: str, limit: NicLimit, owner: str) -> None:
        self._set("rebuild", tap, limit, owner)

    def _set(self, call: str, tap: str, limit: NicLimit, owner: str) -> None:
        with self._file.call(call, owner) as world:
            device = world.taps.get(tap)
            if device is None:
                raise NotFoundError(f"there is no network device {tap!r}.", "hvctl vm list shows which VMs run")
            rates = [rate for rate in (limit.inbound, limit.outbound) if rate is not None]
            for rate in rates:
                bucket(rate, MTU)
            if rates and device.foreign:
                raise RefusedError(
                    f"{tap} has traffic control that is not hvctl's: {device.foreign}.", f"tc qdisc show dev {tap}"
                )
            device.inbound, device.outbound = limit.inbound, limit.outbound
            if rates:
                world.ifbs[ifb_name(tap)] = Ifb(tap, owner)
            else:
                world.ifbs.pop(ifb_name(tap), None)

    def drop_queue(self, tap: str) -> int:
        with self._file.call("drop_queue") as world:
            device = world.taps.get(tap)
            if device is None:
                raise NotFoundError(f"there is no network device {tap!r}.", "hvctl vm list shows which VMs run")
            waiting, device.waiting = device.waiting, 0
            return waiting if device.inbound or device.foreign else 0

    def forget_flows(self, nics: Sequence[Nic], claims: Mapping[str, Sequence[str]]) -> Forgotten:
        with self._file.call("forget_flows") as world:
            taps = [world.taps[n.tap] for n in nics if n.tap in world.taps]
            ours = {a for t in taps for a in t.addresses}
            claimed = {a for n in nics for a in claims.get(n.mac.lower(), ())} | {a for t in taps for a in t.disputed}
            answer = tuple(sorted(ours)), tuple(sorted(claimed - ours))
            if world.flows is None:
                return Forgotten(None, *answer)
            left = [f for f in world.flows if not ours & set(f)]
            deleted, world.flows = len(world.flows) - len(left), left
            return Forgotten(deleted, *answer)

    def clear(self, owner: str) -> None:
        with self._file.call("clear", owner) as world:
            for name, ifb in list(world.ifbs.items()):
                if ifb.owner == owner:
                    del world.ifbs[name]
                    if tap := world.taps.get(ifb.tap):
                        tap.inbound, tap.outbound = None, None

    def owners(self) -> dict[str, tuple[str, ...]]:
        with self._file.call("owners", looks=True) as world:
            owners: dict[str, tuple[str, ...]] = {}
            for name, ifb in sorted(world.ifbs.items()):
                owners[ifb.owner] = (*owners.get(ifb.owner, ()), name)
            return owners


class FakeStorage:
    def __init__(self, file: WorldFile) -> None:
        self._file = file

    def make_disks(self, spec: VmSpec) -> None:
        with self._file.call("make_disks", spec.uuid) as world:
            world.folders[spec.uuid] = spec.folder
        for disk in spec.disks:
            with self._file.change() as world:
                world.files.setdefault(disk.path, File(most=disk.size))

    def make_monitor_folder(self, uuid: str) -> None:
        with self._file.call("make_monitor_folder", uuid) as world:
            world.folders.setdefault(uuid, f"/fake/vms/{uuid}")

    def remove(self, uuid: str) -> None:
        with self._file.call("remove", uuid) as world:
            folder = world.folders.pop(uuid, None)
            if folder:
                world.files = {p: f for p, f in world.files.items() if not p.startswith(f"{folder}/")}

    def folders(self) -> tuple[str, ...]:
        with self._file.call("folders", looks=True) as world:
            return tuple(sorted(world.folders))

    def place_disks(self, uuid: str, load: str, disks: Sequence[Placement]) -> None:
        with self._file.call("place_disks", uuid) as world:
            if any(d.source not in world.files or d.overlay not in world.files for d in disks):
                raise RefusedError("a disk of the saved snapshot is not there.")
            world.files.setdefault(_note(uuid), File(Part(load)))
        for disk in disks:
            # One change each, so that a death in between leaves some of them.
            with self._file.change() as world:
                old = f"{disk.overlay}.{load}.old"
                if old not in world.files:
                    world.files[old] = world.files[disk.overlay]
                    world.files[disk.overlay] = _copy(world.files[disk.source])

    def return_disks(self, uuid: str, load: str, overlays: Sequence[str]) -> None:
        if self.kept_disks(uuid) != load:
            return
        for overlay in overlays:
            with self._file.call("return_disks", uuid) as world:
                old = world.files.pop(f"{overlay}.{load}.old", None)
                world.files[overlay] = old or world.files[overlay]
        with self._file.change() as world:
            del world.files[_note(uuid)]

    def release_disks(self, uuid: str, load: str, overlays: Sequence[str]) -> None:
        with self._file.call("release_disks", uuid) as world:
            note = world.files.get(_note(uuid))
            if note is not None and note.part.text == load:
                del world.files[_note(uuid)]
        for overlay in overlays:
            with self._file.change() as world:
                world.files.pop(f"{overlay}.{load}.old", None)

    def space(self, disk: Disk, tag: str | None = None) -> Space:
        with self._file.call("space", looks=True) as world:
            file = world.files.get(str(disk.path))
            if file is None:
                raise NotFoundError(f"the image {disk.path} is not there.")
            after = file.tags[tag].size if tag in file.tags else None
            return Space(file.part.size, world.disk_room, file.most, after)

    def kept_disks(self, uuid: str) -> str | None:
        with self._file.call("kept_disks", uuid, looks=True) as world:
            note = world.files.get(_note(uuid))
            return note.part.text if note else None


def _note(uuid: str) -> str:
    return f"/fake/vms/{uuid}/load.json"


def _copy(file: File) -> File:
    tags = {name: inner.copy(part) for name, part in file.tags.items()}
    return File(inner.copy(file.part), tags, file.most)
