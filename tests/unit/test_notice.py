"""How a guest says that it is ready: the file that its agent is asked for, run by a shell here, beside its port."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from hvctl.adapters.guest import notice
from hvctl.errors import DeadlineError, GuestError

ID = "0123456789abcdef" * 2


class Agent:
    """Runs what it is asked for, with the folder of notices in another place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._status = 0

    def __call__(self, command: str, arguments: dict[str, Any], seconds: float) -> Any:
        if command == "guest-exec-status":
            return {"exited": True, "exitcode": self._status}
        words = [w.replace(notice.FOLDER, str(self._folder)) for w in (arguments["path"], *arguments["arg"])]
        self._status = subprocess.run(words, timeout=seconds, check=False).returncode
        return {"pid": 1}


def deaf(seconds: float) -> bool:
    raise GuestError("the guest floods its sign-of-life port.")


@pytest.mark.parametrize(
    ("content", "ready"),
    [(None, False), ("", True), (ID, True), (f"{ID}\n", True), ("0" * 32, False), (f"x{ID}", False), (".*", False)],
)
def test_a_file_counts_without_an_id_or_with_that_of_the_notice(
    tmp_path: Path, content: str | None, ready: bool
) -> None:
    if content is not None:
        (tmp_path / "ready").write_text(content)
    assert notice.await_ready(Agent(tmp_path), deaf, ID, 0.0, 30.0) is ready


def test_the_port_is_heard_whether_there_is_an_agent_or_not(tmp_path: Path) -> None:
    """And again and again: what is said late counts, too."""
    heard = iter([False, True, False, True])
    for agent in (Agent(tmp_path), None):
        assert notice.await_ready(agent, lambda _: next(heard), ID, 3600.0, 30.0)


def test_whoever_cannot_be_heard_has_all_the_time(tmp_path: Path) -> None:
    def silent(command: str, arguments: dict[str, Any], seconds: float) -> Any:
        raise DeadlineError(f"the guest agent did not answer {command}.")

    heard: list[float] = []

    def nothing(seconds: float) -> bool:
        heard.append(seconds)
        return False

    for hear in (deaf, nothing):
        assert not notice.await_ready(silent, hear, ID, 0.05, 0.0)
    assert len(heard) <= 1, "a look that comes back early is no reason for another one"
