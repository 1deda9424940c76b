"""The guest agent of a fake guest: the commands hvctl uses, answered as the guest's Behaviour says."""

from __future__ import annotations

import base64
import time
from typing import Any

from hvctl.adapters.fake import life
from hvctl.adapters.fake.state import Exec, FakeVm, World
from hvctl.errors import DeadlineError, GuestError, UnreachableError
from hvctl.model.vm import State

KNOWN = (
    "guest-sync-delimited",
    "guest-ping",
    "guest-info",
    "guest-get-vcpus",
    "guest-set-vcpus",
    "guest-exec",
    "guest-exec-status",
    "guest-set-time",
    "guest-get-time",
    "guest-get-fsinfo",
    "guest-shutdown",
)
NONSENSE = {"\x1b]0;owned\x07": ["\x1b[2J" * 1000, -1, None, {"logical-id": "0; reboot"}]}
KEPT_COMMANDS = 20


def answer(world: World, vm: FakeVm, command: str, arguments: dict[str, Any]) -> Any:
    guest = vm.behaviour
    if vm.state is not State.RUNNING or not vm.has_agent or guest.agent == "absent":
        raise UnreachableError(f"the guest agent of {vm.name} is not connected.", f"hvctl vm show {vm.name}")
    if vm.agent_gap:
        vm.agent_gap -= 1
        raise UnreachableError(f"the guest agent of {vm.name} is not connected yet.", f"hvctl vm show {vm.name}")
    if guest.agent == "silent":
        raise DeadlineError(f"the guest agent of {vm.name} did not answer {command}.", f"hvctl vm console {vm.name}")
    if command in guest.answers:
        return guest.answers[command]
    if guest.agent == "hostile":
        return NONSENSE
    if command in guest.refuses:
        raise GuestError(f"the guest agent of {vm.name} refused {command}: it has been disabled.")
    if command not in KNOWN:
        raise GuestError(f"the guest agent of {vm.name} does not know {command}.")
    return _obey(world, vm, command, arguments)


def _obey(world: World, vm: FakeVm, command: str, arguments: dict[str, Any]) -> Any:
    match command:
        case "guest-sync-delimited":
            return arguments["id"]
        case "guest-info":
            return {"version": "7.2.22", "supported_commands": [{"name": n, "enabled": True} for n in KNOWN]}
        case "guest-get-vcpus":
            return [{"logical-id": i, "online": on, "can-offline": i > 0} for i, on in enumerate(vm.online)]
        case "guest-set-vcpus":
            return _set_vcpus(vm, arguments["vcpus"])
        case "guest-exec":
            return {"pid": _exec(world, vm, arguments)}
        case "guest-exec-status":
            return _exec_status(vm, arguments["pid"])
        case "guest-set-time":
            vm.guest_time = arguments.get("time", 0)
        case "guest-get-time":
            return vm.guest_time or time.time_ns()
        case "guest-get-fsinfo":
            return [{"name": t, "disk": [{"dev": f"/dev/{t}"}]} for t in vm.behaviour.mounted]
        case "guest-shutdown":
            life.halt(world, vm, "shutdown")
    return {}


def _set_vcpus(vm: FakeVm, wanted: list[dict[str, Any]]) -> int:
    """As the real agent: how many of the list were processed; an error only if it was none."""
    for done, item in enumerate(wanted):
        number, online = item["logical-id"], item["online"]
        if not 0 <= number < len(vm.online) or (number == 0 and not online):
            if done == 0:
                raise GuestError(f"the guest of {vm.name} cannot set vCPU {number} to online={online}.")
            return done
        vm.online[number] = online
    return len(wanted)


def _exec(world: World, vm: FakeVm, arguments: dict[str, Any]) -> int:
    words = [arguments["path"], *arguments.get("arg", [])]
    line = " ".join(words)
    vm.executed = [*vm.executed, line][-KEPT_COMMANDS:]
    if words[0].endswith("umount"):
        vm.behaviour.mounted = [t for t in vm.behaviour.mounted if t not in words]
    if "drop_caches" in line:
        vm.behaviour.cache = 0
    pid = world.tick()
    result = vm.behaviour.exec.get(line) or Exec(out=" ".join(words[1:]) + "\n")
    vm.exits[pid] = result if arguments.get("capture-output") else Exec(result.status)
    return pid


def _exec_status(vm: FakeVm, pid: int) -> dict[str, Any]:
    result = vm.exits.pop(pid, None)
    if result is None:
        raise GuestError(f"the guest agent of {vm.name} has no process {pid}.")
    status: dict[str, Any] = {"exited": True, "exitcode": result.status}
    for name, text in (("out-data", result.out), ("err-data", result.err)):
        if text:
            status[name] = base64.b64encode(text.encode()).decode()
    return status
