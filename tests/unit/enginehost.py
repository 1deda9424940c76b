"""What tests of the engine ask of a fake host and its journal, and an image built as far as `create` reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from faults.command import FakeSite

from hvctl import codec
from hvctl.adapters.fake import FakeWorld
from hvctl.engine.operate import Engine
from hvctl.model.allocation import Change, DiskChange, NicChange
from hvctl.model.image import DefaultDisk, Image
from hvctl.model.operation import Operation
from hvctl.operations import vm as verbs

MIB = 1 << 20
GROWN = Change(
    vcpus=3, memory=512 * MIB, cpu_quota=150, cpu_weight=50, nics=(NicChange(None, 10**7, 10**7),),
    disks=(DiskChange(None, iops=500),),
)  # fmt: skip
SHRUNK = Change(vcpus=1, memory=128 * MIB, cpu_quota=50, nics=(NicChange(None, 10**6, 10**6),))


def add_image(site: FakeSite) -> None:
    folder: Path = site.settings.images_dir / "micro-000000000000"
    folder.mkdir(parents=True, mode=0o711)
    for name in ("kernel", "initrd"):
        (folder / name).write_text("")
    disks = (DefaultDisk("data", 64 * MIB),)
    paths = (str(folder / "kernel"), str(folder / "initrd"))
    image = Image("micro", "0" * 64, *paths, "", None, None, None, 0, "2026-01-01T00:00:00Z", 0, disks)
    (folder / "image.json").write_text(json.dumps(codec.dump(image)))


def new_vm(name: str, **parts: Any) -> verbs.NewVm:
    asked: dict[str, Any] = {
        "name": name, "image": "micro", "vcpus": 1, "max_vcpus": 4, "memory": 256 * MIB, "max_memory": 1024 * MIB,
        "disks": None, "bridges": ("br0",), "labels": {}, "start": True,
    }  # fmt: skip
    return verbs.NewVm(**(asked | parts))


def seen(world: FakeWorld) -> dict[str, Any]:
    """Everything that a user, the guest or the kernel could tell apart; not which moment a part is of."""
    now = world.read()
    return {
        "vms": {
            vm.uuid: (
                vm.name, vm.state, vm.process, vm.config, vm.live, vm.record, vm.online, vm.nodes, vm.plugged, vm.torn,
                vm.dead, vm.ram.text, vm.devices.text,
            )
            for vm in now.vms.values()
        },
        "files": {path: (file.part.text, sorted(file.tags)) for path, file in now.files.items()},
        "folders": now.folders,
        "taps": now.taps,
        "ifbs": now.ifbs,
    }  # fmt: skip


def promised(engine: Engine) -> dict[str, Any]:
    host = engine.facts.name
    return {p.vm_uuid: (p, engine.store.record_of(host, p.vm_uuid)) for p in engine.store.promises(host)}


def last(engine: Engine) -> Operation:
    """The newest operation, with its steps."""
    newest = engine.store.operations(engine.facts.name, limit=1)[0]
    return engine.store.operation(newest.id)
