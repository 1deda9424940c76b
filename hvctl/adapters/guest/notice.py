"""What a guest is told of its interruption, and how it says that it is ready: files in /run/hvctl, through its agent,
and a line for its sign-of-life port, which needs no agent.

notice.json holds the notice; every program in /etc/hvctl/notice.d is run with its path. A guest that is ready makes the
file `ready` there, and is not waited for any longer. What it says shortens the wait, and nothing else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from hvctl.adapters.guest import agent as guest
from hvctl.errors import DeadlineError, GuestError, UnreachableError

FOLDER = "/run/hvctl"
HOOKS = "/etc/hvctl/notice.d"
_DELIVER = (
    f"mkdir -p {FOLDER} && rm -f {FOLDER}/ready && cat > {FOLDER}/notice.new && "
    f"mv {FOLDER}/notice.new {FOLDER}/notice.json && "
    f'for hook in {HOOKS}/*; do if [ -x "$hook" ]; then '
    f'"$hook" {FOLDER}/notice.json </dev/null >/dev/null 2>&1 & fi; done'
)
_READY = f"[ -e {FOLDER}/ready ]"
_POLL = 0.5
_MOST = 4096
_REASON = 200


def line(notice: Mapping[str, str]) -> str:
    """The notice in one line of ASCII: event, how, the two times, and the reason, which may have blanks and be cut."""
    reason = "".join(c if " " <= c <= "~" else "?" for c in notice["reason"])[:_REASON]
    return " ".join(("notice", *(notice[word] for word in ("event", "how", "at", "returns")), reason))


def deliver(call: guest.Call, notice: Mapping[str, str], seconds: float) -> None:
    """GuestError: the guest could not take it; else as every call of the agent."""
    text = json.dumps(notice, sort_keys=True).encode() + b"\n"
    done = guest.run(call, ["/bin/sh", "-c", _DELIVER], text, seconds, max_bytes=_MOST)
    if done.status != 0:
        raise GuestError(f"the guest could not take the notice: its shell ended with {done.status}.")


def await_ready(call: guest.Call, seconds: float, answer: float) -> bool:
    """Whether the guest says within `seconds` that it is ready; `answer` is for its agent each time. The agent has no
    events, so it is asked now and then. A guest that does not answer is given its time all the same."""
    until = time.monotonic() + seconds
    while True:
        try:
            ready = guest.run(call, ["/bin/sh", "-c", _READY], seconds=answer, max_bytes=_MOST).status == 0
        except (DeadlineError, UnreachableError, GuestError):
            ready = False
        left = until - time.monotonic()
        if ready or left <= 0:
            return ready
        time.sleep(min(_POLL, left))
