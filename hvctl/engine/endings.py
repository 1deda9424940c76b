"""How an operation that failed is closed and told, and what is answered to a request that was done before."""

from __future__ import annotations

import json
from typing import Any

from hvctl import codec
from hvctl.engine.execute import Execution, StepError
from hvctl.engine.lock import VmLock
from hvctl.engine.quarantine import way_out
from hvctl.engine.site import Site
from hvctl.errors import BusyError, HvctlError, NotUndoneError, RefusedError, UndoneError
from hvctl.model.operation import Before, Kind, Operation, OpState, Outcome, Phase
from hvctl.model.stepwords import step_name


def failed(site: Site, lock: VmLock, operation: Operation, run: Execution, error: StepError) -> None:
    """Close the row as what it is, and tell the operator; always raises."""
    what = f"{operation.kind} of {operation.vm_name} failed at {step_name(error.step)}: {error.message}"
    lost = operation.kind is Kind.RESET and _process_ended(site, operation)
    if error.unknown and not lost:
        raise NotUndoneError(
            f"{what} The result is unknown, so the operation stays open.", "hvctl recover ends it"
        ) from error.cause
    kind: type[NotUndoneError | UndoneError | RefusedError]
    if lost:
        state, kind, tail = OpState.FAILED, NotUndoneError, "The QEMU process has ended, and with it the guest."
    elif error.torn:
        state, kind, tail = OpState.QUARANTINED, NotUndoneError, "The guest stays paused: its memory is mixed."
    elif error.undo_failed:
        state, kind = OpState.FAILED, NotUndoneError
        tail = f"Not undone: {'; '.join(error.undo_failed)}."
    else:
        # What could not even be begun is refused, though something had to be tried to find that out.
        refused = isinstance(error.cause, RefusedError) and run.phase is Phase.BEGUN
        state, kind, tail = OpState.UNDONE, RefusedError if refused else UndoneError, "Everything is as it was."
    site.store.close_operation(operation.id, state, reason=f"{error.message} {tail}", steps=run.records)
    lock.clear()
    hint = f"hvctl vm start {operation.vm_name} boots it from its disks" if lost else error.hint
    if error.torn and not lost:
        hint = f"{way_out(operation.vm_name)}: it boots from its disks"
    raise kind(f"{what} {tail}", hint) from error.cause


def left_open(operation: Operation) -> HvctlError:
    """What is said when whoever asked for it ends hvctl half-way."""
    what = f"{operation.kind} of {operation.vm_name} was interrupted"
    return HvctlError(
        f"{what}: operation {operation.id} stays open, and its guest may be paused.", "hvctl recover ends it"
    )


def _process_ended(site: Site, operation: Operation) -> bool:
    """Whether the VM's QEMU is surely not the one that the operation began with."""
    before = codec.load(Before, operation.before)
    try:
        now = site.host.domains.get(operation.vm_uuid)
    except HvctlError:
        return False
    return before.vm is not None and now.process != before.vm.process


def replayed(kind: Kind, known: Operation, ref: str, request: dict[str, Any]) -> Outcome:
    """The answer that this key's operation got the first time. RefusedError for another request: it was not done, and
    may not look as if it was."""
    same_vm = ref in (known.vm_name, known.vm_uuid)
    if known.kind is not kind or not same_vm or known.request != json.loads(json.dumps(request)):
        raise RefusedError(
            f"this key was used for {known.kind} of {known.vm_name}, which was not the same request.",
            f"hvctl operation show {known.id} shows it; use a new --key",
        )
    if known.state is OpState.OPEN:
        raise BusyError(f"operation {known.id} with this key is still open.", "hvctl operation show " + str(known.id))
    if known.state is not OpState.DONE:
        ended = UndoneError if known.state is OpState.UNDONE else NotUndoneError
        raise ended(f"operation {known.id} with this key ended {known.state}: {known.reason}", "use a new --key")
    result = dict(known.result or {})
    warnings = tuple(result.pop("warnings", ()))
    goal, _ = result.pop("goal", f"{known.kind} {known.vm_name}"), result.pop("reasons", ())
    return Outcome(
        known.kind,
        known.vm_uuid,
        known.vm_name,
        known.state,
        goal,
        (),
        ("this key's operation was done before",),
        known.id,
        known.steps,
        warnings,
        result=result,
    )
