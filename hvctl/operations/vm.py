"""The life of VMs: create, start, stop, delete, protect, adopt, exec; list and show read."""

from __future__ import annotations

import contextlib
import hashlib
import re
import uuid as uuids
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvctl.adapters.guest import agent as guest
from hvctl.decide import life
from hvctl.engine.applied import agent_call
from hvctl.engine.observe import observe
from hvctl.engine.operate import Decision, Engine
from hvctl.errors import DeadlineError, NotFoundError, RefusedError, UsageError
from hvctl.model.allocation import Allocation, DiskLimit, NicLimit, Record
from hvctl.model.image import Image
from hvctl.model.operation import Before, Kind, Outcome
from hvctl.model.plan import Refusal
from hvctl.model.pool import Rung
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import Accel, DiskSpec, NicSpec, State, Vm, VmSpec
from hvctl.units import format_size

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
DISKS = 20  # they share the slots of one PCI bus with everything else
LABEL = re.compile(r"[a-z0-9]([a-z0-9._/-]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class NewVm:
    """What an operator asks of a new VM. disks None: those of the image; bridges: one NIC each."""

    name: str
    image: str
    vcpus: int
    max_vcpus: int
    memory: int
    max_memory: int
    disks: tuple[tuple[str, int], ...] | None
    bridges: tuple[str, ...]
    labels: Mapping[str, str]
    start: bool


def create(engine: Engine, new: NewVm, *, dry_run: bool = False, key: str | None = None) -> Outcome:
    """Make a VM: overlays, definition, record; and start it if asked. Without its bridge it cannot start, and is
    refused; one that is to start later is made all the same, with a warning."""
    from hvctl.adapters.images import imagestore

    _check(new)
    image = imagestore.find(engine.settings, new.image)
    identity = str(uuids.uuid4())
    spec = _spec(engine, new, image, identity)

    def decide(vm: Vm | None) -> Decision | Refusal:
        if any(d.name == new.name for d in engine.host.domains.list()):
            return Refusal(f"there is a VM {new.name} already.", f"hvctl vm show {new.name}")
        lacking = [b for b in dict.fromkeys(new.bridges) if not engine.host.network.bridge(b)]
        plan = life.plan_create(spec, new.start, lacking)
        if isinstance(plan, Refusal):
            return plan
        return Decision(
            plan,
            Before(vm=vm, goal=spec.record, holds=new.start),
            goal=spec.record,
            holds=new.start,
            result={"uuid": identity, "accel": spec.accel.value},
            warnings=tuple(f"there is no bridge {b} yet, which {new.name} needs to start" for b in lacking),
        )

    request = {"name": new.name, "image": new.image, "start": new.start}
    if dry_run:
        return engine.preview(Kind.CREATE, None, new.name, decide)
    return engine.change(Kind.CREATE, identity, request, decide, key=key, new=new.name)


def _check(new: NewVm) -> None:
    if not NAME.fullmatch(new.name):
        raise UsageError(f"{new.name!r} is not a name for a VM.", "use a to z, 0 to 9 and -, at most 63, such as ci-1")
    if not 1 <= new.vcpus <= new.max_vcpus <= 255:
        raise UsageError(f"{new.vcpus} of at most {new.max_vcpus} vCPUs does not work.", "1 <= --vcpus <= --max-vcpus")
    if new.memory > new.max_memory:
        raise UsageError(
            f"--memory {format_size(new.memory)} is above --max-memory {format_size(new.max_memory)}.",
            "raise --max-memory",
        )
    for label, value in new.labels.items():
        if not LABEL.fullmatch(label) or len(value) > 256 or not value.isprintable():
            raise UsageError(f"the label {label!r} is not usable.", "write KEY=VALUE with printable text")
    if len(new.disks or ()) > DISKS:
        raise UsageError(f"{len(new.disks or ())} disks are too many.", f"a VM has at most {DISKS} of its own")
    names = [d for d, _ in new.disks or ()]
    for name, size in new.disks or ():
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,19}", name) or names.count(name) > 1:
            raise UsageError(f"{name!r} is not a name for a disk of its own.", "write NAME:SIZE, such as data:64MiB")
        if size < 1 << 20 or size % (1 << 20):
            raise UsageError(f"the disk {name} has {size} bytes.", "disks are whole MiB, such as data:64MiB")


def _spec(engine: Engine, new: NewVm, image: Image, identity: str) -> VmSpec:
    from hvctl.adapters.node.kvmprobe import kvm_works

    if new.memory < image.min_memory:
        raise RefusedError(f"{new.image} needs {format_size(image.min_memory)} of memory to boot.", "raise --memory")
    folder = engine.settings.vms_dir / identity
    asked = new.disks if new.disks is not None else tuple((d.name, d.size) for d in image.disks)
    disks: list[tuple[str, int, str | None, str | None]] = [(name, size, None, None) for name, size in asked]
    if image.root:
        disks.insert(0, ("root", image.root_size or 0, image.root, image.root_format))
    short = hashlib.sha256(identity.encode()).digest()
    nics = tuple(
        NicSpec(bridge, f"52:54:00:{short[0]:02x}:{short[1]:02x}:{i:02x}", f"hv{short[:4].hex()}{i:02d}")
        for i, bridge in enumerate(new.bridges)
    )
    targets = tuple(f"vd{chr(ord('a') + i)}" for i in range(len(disks)))
    unlimited = tuple(NicLimit(n.mac) for n in nics), tuple(DiskLimit(t) for t in targets)
    record = Record(Allocation(new.vcpus, new.memory, None, None, *unlimited), image=new.image, labels=dict(new.labels))
    fake = engine.settings.uri.startswith("fake://")
    return VmSpec(
        uuid=identity,
        name=new.name,
        image=image.name,
        accel=Accel.KVM if not fake and kvm_works(engine.settings)[0] else Accel.TCG,
        vcpus=new.vcpus,
        max_vcpus=new.max_vcpus,
        memory=new.memory,
        max_memory=new.max_memory,
        kernel=image.kernel,
        initrd=image.initrd,
        cmdline=image.cmdline,
        folder=str(folder),
        monitor=str(folder / "qmp" / "monitor.sock"),
        pulse=str(folder / "pulse"),
        disks=tuple(
            DiskSpec(name, target, str(folder / f"{name}.qcow2"), size, backing, backing_format)
            for target, (name, size, backing, backing_format) in zip(targets, disks, strict=True)
        ),
        nics=nics,
        labels=dict(new.labels),
        record=record,
    )


def _present(vm: Vm | None, ref: str) -> Vm:
    if vm is None:
        raise NotFoundError(f"there is no VM {ref}.", "hvctl vm list")
    return vm


def start(engine: Engine, ref: str, *, dry_run: bool = False, key: str | None = None) -> Outcome:
    """Start a VM with what was promised to it, if the host has room."""

    def decide(found: Vm | None) -> Decision | Refusal:
        vm = _present(found, ref)
        away = next((a for a in engine.store.pool.away(engine.facts.name) if a.vm_uuid == vm.uuid), None)
        if away and away.rung is Rung.SAVE and not vm.state.active:
            return Refusal(f"{vm.name} was interrupted, and its guest is saved.", f"hvctl resume {vm.name}")
        if away and vm.state is State.PAUSED:
            # virsh would have it run on what was given to others.
            return Refusal(f"{vm.name} was interrupted, and is paused.", f"hvctl resume {vm.name}")
        plan = life.plan_start(vm, _layers(engine, vm))
        if isinstance(plan, Refusal):
            return plan
        record = vm.record or Record(vm.allocation)
        return Decision(plan, Before(vm=vm, goal=record, holds=True), goal=record, holds=True)

    return _run(engine, Kind.START, ref, {}, decide, dry_run, key)


def stop(
    engine: Engine, ref: str, *, force: bool, seconds: float, dry_run: bool = False, key: str | None = None
) -> Outcome:
    def decide(found: Vm | None) -> Decision | Refusal:
        vm = _present(found, ref)
        if vm.protected:
            return life.protected(vm, "stop")
        plan = life.plan_stop(vm, _layers(engine, vm), force=force, seconds=seconds)
        if isinstance(plan, Refusal):
            return plan
        record = vm.record or Record(vm.allocation)
        return Decision(plan, Before(vm=vm, goal=record), goal=record, holds=False)

    return _run(engine, Kind.STOP, ref, {"force": force}, decide, dry_run, key)


def delete(engine: Engine, ref: str, *, force: bool, dry_run: bool = False, key: str | None = None) -> Outcome:
    def decide(found: Vm | None) -> Decision | Refusal:
        vm = _present(found, ref)
        plan = life.plan_delete(vm, _layers(engine, vm), force)
        return plan if isinstance(plan, Refusal) else Decision(plan, Before(vm=vm), forget=True)

    return _run(engine, Kind.DELETE, ref, {}, decide, dry_run, key)


def protect(engine: Engine, ref: str, on: bool, *, dry_run: bool = False, key: str | None = None) -> Outcome:
    def decide(found: Vm | None) -> Decision | Refusal:
        vm = _present(found, ref)
        plan = life.plan_protect(vm, on)
        goal = plan.steps[0].record if plan.steps else vm.record  # type: ignore[union-attr]
        return Decision(plan, Before(vm=vm, goal=goal, holds=vm.state.active), goal=goal, holds=vm.state.active)

    return _run(engine, Kind.PROTECT, ref, {"on": on}, decide, dry_run, key)


def configure(
    engine: Engine,
    ref: str,
    *,
    priority: int | None = None,
    interruptible: bool | None = None,
    dry_run: bool = False,
    key: str | None = None,
) -> Outcome:
    """Set what interruptions go by; None leaves it as it is."""

    def decide(found: Vm | None) -> Decision | Refusal:
        vm = _present(found, ref)
        plan = life.plan_set(vm, priority, interruptible)
        if isinstance(plan, Refusal):
            return plan
        goal = plan.steps[0].record if plan.steps else vm.record  # type: ignore[union-attr]
        return Decision(plan, Before(vm=vm, goal=goal, holds=vm.state.active), goal=goal, holds=vm.state.active)

    request = {"priority": priority, "interruptible": interruptible}
    return _run(engine, Kind.SET, ref, request, decide, dry_run, key)


def adoption(engine: Engine, vm: Vm) -> tuple[str, str]:
    """The VM's definition as it is, and as warm resets need it."""
    from hvctl.adapters.libvirt import domainxml

    xml = domainxml.plain(engine.host.domains.xml(vm.uuid))
    folder = engine.settings.vms_dir / vm.uuid
    return xml, domainxml.adopted(xml, str(folder / "qmp" / "monitor.sock"), str(folder / "pulse"))


def adopt(engine: Engine, ref: str, *, dry_run: bool = False, key: str | None = None) -> Outcome:
    """Change the definition of a VM that somebody else defined, in place, for warm resets from its next start on."""

    def decide(found: Vm | None) -> Decision | Refusal:
        vm = _present(found, ref)
        xml, adopted = adoption(engine, vm)
        plan = life.plan_adopt(vm, xml, adopted)
        if isinstance(plan, Refusal):
            return plan
        record = vm.record or Record(vm.allocation)
        holds = vm.state.active
        return Decision(plan, Before(vm=vm, goal=record, xml=xml, holds=holds), goal=record, holds=holds)

    return _run(engine, Kind.ADOPT, ref, {}, decide, dry_run, key)


def run(engine: Engine, ref: str, argv: Sequence[str], stdin: bytes, seconds: float, limit: int) -> guest.ExecResult:
    """Run a program in the guest through its agent; output beyond `limit` bytes a stream is cut and said so."""
    vm = observe(engine.host, ref)
    if vm.state is not State.RUNNING:
        raise RefusedError(f"{vm.name} is {vm.state}: nothing can run in it.", f"hvctl vm start {vm.name}")
    call = agent_call(engine.host, vm.uuid)
    if vm.has_agent and not vm.agent_connected:
        # libvirt has the agent's channel for closed about a second after a reset. Waited for before the program is
        # started, never after: it must not run twice.
        with contextlib.suppress(DeadlineError):
            guest.wait(call, min(seconds, guest.GAP))
    return guest.run(call, argv, stdin, seconds, limit)


def _run(
    engine: Engine, kind: Kind, ref: str, request: dict[str, Any], decide: Any, dry_run: bool, key: str | None
) -> Outcome:
    if dry_run:
        return engine.preview(kind, ref, ref, decide)
    return engine.change(kind, ref, request, decide, key=key)


def _layers(engine: Engine, vm: Vm) -> tuple[Snapshot, ...]:
    """All that is kept of a VM's snapshots, newest first: so nothing that goes is built on any more."""
    return tuple(reversed(engine.host.machine.snapshots(vm.uuid, hidden=True)))
