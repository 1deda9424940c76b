"""What a guest is told of its interruption, and how it says that it is ready: with files in /run/hvctl, through its
agent, and with lines on its sign-of-life port, which need no agent.

notice.json holds the notice; every program in /etc/hvctl/notice.d is run with its path. A guest that is ready makes the
file `ready` there, empty or with the notice's id in it, or says `ready ID` on the port, and is not waited for any
longer. What it says shortens the wait, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping

from hvctl.adapters.guest import agent as guest
from hvctl.errors import DeadlineError, GuestError, HvctlError, UnreachableError

FOLDER = "/run/hvctl"
HOOKS = "/etc/hvctl/notice.d"
_DELIVER = (
    f"mkdir -p {FOLDER} && rm -f {FOLDER}/ready && cat > {FOLDER}/notice.new && "
    f"mv {FOLDER}/notice.new {FOLDER}/notice.json && "
    f'for hook in {HOOKS}/*; do if [ -x "$hook" ]; then '
    f'"$hook" {FOLDER}/notice.json </dev/null >/dev/null 2>&1 & fi; done'
)
# With the id as $1: of another notice it does not count.
_READY = f'[ -e {FOLDER}/ready ] && {{ [ ! -s {FOLDER}/ready ] || grep -qxF "$1" {FOLDER}/ready; }}'
_POLL = 0.5
_MOST = 4096
_REASON = 200


def line(notice: Mapping[str, str]) -> str:
    """The notice in one line of ASCII: event, how, the two times, its id, and the reason, which may have blanks and be
    cut."""
    reason = "".join(c if " " <= c <= "~" else "?" for c in notice["reason"])[:_REASON]
    return " ".join(("notice", *(notice[word] for word in ("event", "how", "at", "returns", "id")), reason))


def ready_line(identity: str) -> str:
    """What a guest says on its port when it is ready for the interruption with this id."""
    return f"ready {identity}"


def deliver(call: guest.Call, notice: Mapping[str, str], seconds: float) -> None:
    """GuestError: the guest could not take it; else as every call of the agent."""
    text = json.dumps(notice, sort_keys=True).encode() + b"\n"
    done = guest.run(call, ["/bin/sh", "-c", _DELIVER], text, seconds, max_bytes=_MOST)
    if done.status != 0:
        raise GuestError(f"the guest could not take the notice: its shell ended with {done.status}.")


def await_ready(
    call: guest.Call | None, hear: Callable[[float], bool], identity: str, seconds: float, answer: float
) -> bool:
    """Whether the guest says within `seconds` that it is ready for the interruption with this id, in a file or on its
    port: `hear` is for so many seconds whether it says the line there.

    The agent (call None: the guest has none) has no events, so it is asked now and then, `answer` seconds each time;
    meanwhile the line is heard as soon as it is said. A guest that cannot be heard is given its time all the same."""
    until = time.monotonic() + seconds
    while True:
        if call is not None and _file(call, identity, answer):
            return True
        left = until - time.monotonic()
        if left <= 0:
            return False
        if _heard(hear, min(_POLL, left)):
            return True


def _file(call: guest.Call, identity: str, answer: float) -> bool:
    try:
        return guest.run(call, ["/bin/sh", "-c", _READY, "sh", identity], seconds=answer, max_bytes=_MOST).status == 0
    except (DeadlineError, UnreachableError, GuestError):
        return False


def _heard(hear: Callable[[float], bool], seconds: float) -> bool:
    """Takes all the time where there is no port, or nobody to hear on it."""
    until = time.monotonic() + seconds
    with contextlib.suppress(HvctlError):
        if hear(seconds):
            return True
    time.sleep(max(0.0, until - time.monotonic()))
    return False
