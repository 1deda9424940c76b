"""What the steps of an interruption and of a return do."""

from __future__ import annotations

from dataclasses import asdict, replace

from hvctl.adapters.guest import notice
from hvctl.engine.applied import AGENT_SECONDS, Applied, agent_call
from hvctl.errors import BusyError, HvctlError, RefusedError
from hvctl.model import awaysteps as a
from hvctl.model import plan as p
from hvctl.model.vm import State, Vm
from hvctl.ports import Host

_OFF = frozenset({State.OFF})
_GONE_SECONDS = 15.0


def away_hand(host: Host, step: p.Step) -> Applied | None:
    """None: it is another one's step."""
    match step:
        case a.NotifyGuest():
            return _notify(host, step)
        case a.SuspendGuest(uuid):
            was = host.domains.get(uuid).state
            host.domains.pause(uuid)
            return Applied(None if was is State.PAUSED else a.ContinueGuest(uuid))
        case a.ContinueGuest(uuid):
            host.domains.resume(uuid)
            return Applied()
        case a.SaveGuest(uuid):
            return _save(host, uuid)
        case a.EndGuest(uuid, seconds):
            return _end(host, uuid, seconds)
        case _:
            return None


def _notify(host: Host, step: a.NotifyGuest) -> Applied:
    """A guest that cannot be told is interrupted all the same, without a wait: nobody in it knows of one."""
    told = {k: str(v) for k, v in asdict(step.notice).items()}
    try:
        vm = host.domains.get(step.uuid)
        by = _tell(host, vm, told)
    except HvctlError as e:
        warning = f"the guest was not told of its {step.notice.event}: {e.message}"
        return Applied(warning=warning, facts={"told": False})
    inverse = None
    if step.notice.event is a.Event.INTERRUPTION:
        inverse = a.NotifyGuest(step.uuid, replace(step.notice, event=a.Event.WITHDRAWN))
    if step.seconds <= 0:
        return Applied(inverse, facts={"told": True, "by": by})
    identity = step.notice.id
    ready = notice.await_ready(
        agent_call(host, step.uuid) if "document" in by else None,
        lambda seconds: host.machine.hear(vm, notice.ready_line(identity), seconds),
        identity,
        step.seconds,
        AGENT_SECONDS,
    )
    return Applied(inverse, facts={"told": True, "by": by, "ready": ready})


def _tell(host: Host, vm: Vm, told: dict[str, str]) -> list[str]:
    """How the guest was told; HvctlError: in no way."""
    by = ["line"] if _line(host, vm, told) else []
    try:
        notice.deliver(agent_call(host, vm.uuid), told, AGENT_SECONDS)
    except HvctlError:
        if not by:
            raise
        return by
    return [*by, "document"]


def _line(host: Host, vm: Vm, told: dict[str, str]) -> bool:
    """Whether the guest took the line; a guest that cannot hear it may still have an agent."""
    try:
        return host.machine.tell(vm, notice.line(told))
    except HvctlError:
        return False


def _save(host: Host, uuid: str) -> Applied:
    vm = host.domains.get(uuid)
    if not vm.state.active:
        return Applied()
    if vm.state is not State.RUNNING:
        # It would be saved as paused, and nobody would let it go on.
        raise RefusedError(f"{vm.name} is {vm.state} ({vm.reason}): only a guest that runs is saved.")
    host.domains.save(uuid)
    return _seen_off(host, uuid, {"bytes": vm.allocation.memory})


def _end(host: Host, uuid: str, seconds: float) -> Applied:
    vm = host.domains.get(uuid)
    if not vm.state.active:
        return Applied(facts={"how": "off already"})
    if vm.state is State.RUNNING:
        host.domains.shutdown(uuid)
        if host.domains.wait_state(uuid, _OFF, seconds) is State.OFF:
            return Applied(facts={"how": "powered off"})
    host.domains.destroy(uuid)
    ended = _seen_off(host, uuid, {"how": "its process was ended"})
    return replace(ended, warning=f"the guest of {vm.name} did not power off in {seconds:g} s: its process was ended")


def _seen_off(host: Host, uuid: str, facts: dict[str, object]) -> Applied:
    """Nothing of a victim is given to anybody before this."""
    state = host.domains.wait_state(uuid, _OFF, _GONE_SECONDS)
    if state is not State.OFF:
        raise BusyError(f"the VM is {state} after it was ended.", "hvctl recover looks again")
    return Applied(facts=facts)
