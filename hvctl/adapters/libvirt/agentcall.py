"""The guest agent through libvirt: one command, its answer, and what each way of not answering means."""

from __future__ import annotations

import json
import math
from typing import Any

import libvirt
import libvirt_qemu

from hvctl.adapters.libvirt.calls import Connection, clean, code_of, state_of, text_of, translate, went_away
from hvctl.errors import DeadlineError, GuestError, UnreachableError
from hvctl.model.vm import State

_AGENT_GRACE = 2.0  # seconds for libvirt's own deadline to come first
_ONCE = "guest-exec"  # all other commands may be repeated


def ask(connection: Connection, uri: str, uuid: str, command: str, arguments: dict[str, Any], seconds: float) -> Any:
    """ports.Domains.agent: the return value of one command."""
    request: dict[str, Any] = {"execute": command}
    if arguments:
        request["arguments"] = arguments

    def act(opened: Any) -> Any:
        domain = opened.lookupByUUIDString(uuid)
        if state_of(domain) is not State.RUNNING:
            raise UnreachableError("the guest agent cannot answer: the VM does not run.", "hvctl vm start starts it")
        try:
            return libvirt_qemu.qemuAgentCommand(domain, json.dumps(request), max(1, math.ceil(seconds)), 0)
        except libvirt.libvirtError as e:
            code, said = code_of(e), text_of(e)
            if code == libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED:
                raise UnreachableError(f"the VM has no guest agent channel: {said}.", "hvctl vm adopt adds it") from e
            if code == libvirt.VIR_ERR_RPC and "payload" in said:
                raise GuestError(
                    f"the guest agent's answer to {clean(command, 40)} is larger than libvirt carries (4 MiB).",
                    "write large output to a file in the guest",
                ) from e
            if code == libvirt.VIR_ERR_INTERNAL_ERROR and "agent" in said:
                refusal = said.rpartition("error was ")[2].rpartition(f"'{clean(command, 40)}': ")[2]
                raise GuestError(f"the guest agent refuses {clean(command, 40)}: {refusal}.") from e
            if command == _ONCE and went_away(e):
                # It may have been begun: whoever takes libvirt for unreachable begins it again.
                raise DeadlineError(f"libvirt went away: {said}.") from e
            raise translate(e, uri, f"ask the guest agent for {command}") from e

    try:
        reply = connection.call(f"ask the guest agent for {command}", act, seconds=seconds + _AGENT_GRACE)
    except DeadlineError as e:
        if "disappeared" in e.message:  # at once, after a reset: nobody waited
            raise
        raise DeadlineError(
            f"the guest agent did not answer {command} within {seconds:g} s; the result is unknown."
        ) from e
    try:
        answer = json.loads(reply)
    except (ValueError, RecursionError) as e:
        raise GuestError(f"the guest agent's answer to {command} is not JSON.") from e
    if not isinstance(answer, dict) or "return" not in answer:
        raise GuestError(f"the guest agent's answer to {command} has no return value.")
    return answer["return"]
