"""The QMP session against peers that misbehave, and against a real QEMU without a guest."""

from __future__ import annotations

import gc
import json
import os
import select
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from hvctl.adapters.qemu.qmp import COMMANDS, JOB_ID, Ahead, Command, Qmp
from hvctl.errors import DeadlineError, GuestError, HvctlError, RefusedError, UnreachableError

GREETING = {"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}
Script = Callable[["Peer"], None]


class Peer:
    """The QEMU side of one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unread = ""
        self.heard: list[dict[str, Any]] = []

    def say(self, message: object) -> None:
        self.raw(json.dumps(message).encode() + b"\r\n")

    def raw(self, data: bytes) -> None:
        self._connection.sendall(data)

    def hear(self) -> dict[str, Any]:
        """The next command; EOFError when the client is gone. Commands come without anything between them."""
        while True:
            with suppress(json.JSONDecodeError):
                command, end = json.JSONDecoder().raw_decode(self._unread)
                self._unread = self._unread[end:].lstrip()
                self.heard.append(command)
                return self.heard[-1]
            data = self._connection.recv(1 << 16)
            if not data:
                raise EOFError
            self._unread += data.decode()

    def await_unread(self, end: str) -> None:
        """Until what came and is no whole command yet ends so."""
        while not self._unread.endswith(end):
            data = self._connection.recv(1 << 16)
            if not data:
                raise EOFError
            self._unread += data.decode()

    def greet(self) -> None:
        self.say(GREETING)
        self.answer({})

    def answer(self, value: object) -> None:
        self._reply(self.hear(), {"return": value})

    def refuse(self, text: str) -> None:
        self._reply(self.hear(), {"error": {"class": "GenericError", "desc": text}})

    def _reply(self, command: dict[str, Any], answer: dict[str, object]) -> None:
        self.say(answer | ({"id": command["id"]} if "id" in command else {}))

    def wait_for_end(self) -> None:
        with suppress(EOFError):
            while True:
                self.hear()

    def close(self) -> None:
        self._connection.close()


@contextmanager
def served(*scripts: Script) -> Iterator[tuple[str, list[Peer]]]:
    """A socket with a peer that plays a script to whoever connects first, the next one to the second."""
    peers: list[Peer] = []
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        path = str(Path(folder) / "qmp")
        server.bind(path)
        server.listen(1)
        # A test that never connects must not keep the thread.
        server.settimeout(30)

        def play() -> None:
            for script in scripts:
                connection, _ = server.accept()
                peers.append(peer := Peer(connection))
                try:
                    with suppress(EOFError, OSError):
                        script(peer)
                finally:
                    peer.close()

        thread = threading.Thread(target=play)
        thread.start()
        try:
            yield path, peers
        finally:
            thread.join()


def talk(script: Script, deadline: float = 20.0) -> list[dict[str, Any]]:
    """Ask for the status and list nodes; what the peer heard."""
    with served(script) as (path, peers):
        with Qmp(path, deadline) as qmp:
            qmp.execute("query-status")
            qmp.execute("query-block")
    return peers[0].heard


def test_commands_and_answers() -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.answer({"status": "running"})
        peer.say({"event": "STOP", "timestamp": {"seconds": 0, "microseconds": 0}})
        peer.answer([])
        peer.wait_for_end()

    assert [m["execute"] for m in talk(script)] == ["qmp_capabilities", "query-status", "query-block"]


def nothing(peer: Peer) -> None:
    peer.close()


def garbage(peer: Peer) -> None:
    peer.raw(b"SSH-2.0-OpenSSH_9\r\n")


def not_qmp(peer: Peer) -> None:
    peer.say(["QMP"])


def no_negotiation(peer: Peer) -> None:
    peer.say(GREETING)
    peer.hear()


def dies_after(commands: int) -> Script:
    def script(peer: Peer) -> None:
        peer.greet()
        for _ in range(commands):
            peer.answer({})
        peer.hear()

    return script


def dies_when_greeted(peer: Peer) -> None:
    peer.greet()


def garbage_in_the_middle(peer: Peer) -> None:
    peer.greet()
    peer.hear()
    peer.raw(b"\x00\xff}{\r\n")
    peer.wait_for_end()


def answer_of_no_shape(peer: Peer) -> None:
    peer.greet()
    peer.say({"id": peer.hear()["id"], "error": "no"})
    peer.wait_for_end()


@pytest.mark.parametrize(
    "script",
    [
        nothing,
        garbage,
        not_qmp,
        no_negotiation,
        dies_when_greeted,
        dies_after(0),
        dies_after(1),
        garbage_in_the_middle,
        answer_of_no_shape,
    ],
)
def test_a_broken_peer_is_unreachable(script: Script) -> None:
    with pytest.raises(UnreachableError):
        talk(script)


@pytest.mark.parametrize("greets", [False, True])
def test_a_silent_peer_is_a_deadline(greets: bool) -> None:
    def script(peer: Peer) -> None:
        if greets:
            peer.greet()
        peer.wait_for_end()

    with pytest.raises(DeadlineError):
        talk(script, deadline=0.2)


def test_no_peer_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="No such file"), Qmp(str(tmp_path / "none"), 1.0):
        pass
    with socket.socket(socket.AF_UNIX) as closed:
        closed.bind(str(tmp_path / "closed"))
    with pytest.raises(UnreachableError, match="refused"), Qmp(str(tmp_path / "closed"), 1.0):
        pass


def test_a_socket_of_another_process_is_refused() -> None:
    with served(lambda peer: peer.greet()) as (path, _):
        with pytest.raises(UnreachableError, match="belongs to process"), Qmp(path, 1.0, pid=1):
            pass

    def script(peer: Peer) -> None:
        peer.greet()
        peer.wait_for_end()

    with served(script) as (path, _), Qmp(path, 20.0, pid=os.getpid()):
        pass


@pytest.mark.parametrize("k", [0, 1])
def test_an_error_is_told_in_qemus_words(k: int) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        for _ in range(k):
            peer.answer({})
        peer.refuse("Disk is on fire")
        peer.wait_for_end()

    with pytest.raises(GuestError, match=f"query-{'block' if k else 'status'}: Disk is on fire"):
        talk(script)


def test_only_known_commands_are_sent() -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.wait_for_end()

    with served(script) as (path, peers):
        with Qmp(path, 20.0) as qmp:
            for command in ("human-monitor-command", "quit", "query-status ", ""):
                with pytest.raises(RefusedError):
                    qmp.execute(command)  # type: ignore[arg-type]
    assert len(peers[0].heard) == 1
    assert not COMMANDS & {"quit", "system_reset", "xen-load-devices-state"}


# --- jobs


def change(peer: Peer, status: str) -> None:
    peer.say(
        {
            "event": "JOB_STATUS_CHANGE",
            "data": {"id": JOB_ID, "status": status},
            "timestamp": {"seconds": 0, "microseconds": 0},
        }
    )


def job_state(status: str, **more: str) -> list[dict[str, str]]:
    return [{"id": "backup", "status": "running"}, {"id": JOB_ID, "status": status, **more}]


def run_job(script: Script, seconds: float = 20.0) -> list[str]:
    with served(script) as (path, peers):
        with Qmp(path, 20.0) as qmp:
            try:
                qmp.job("snapshot-save", {"tag": "t"}, seconds)
            finally:
                qmp.dismiss()
    return [m["execute"] for m in peers[0].heard][1:]


def test_a_job_is_followed_by_its_events_and_dismissed() -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.answer({})
        peer.answer(job_state("running"))
        peer.answer(job_state("running"))
        change(peer, "concluded")
        peer.answer(job_state("concluded"))
        peer.answer(job_state("concluded"))
        peer.answer({})
        peer.wait_for_end()

    assert run_job(script) == ["snapshot-save", *["query-jobs"] * 4, "job-dismiss"]


def test_a_job_that_runs_in_the_main_loop_is_one_exchange() -> None:
    """It is over before QEMU answers the question after it; what it needs and what undoes that go with it. The job is
    dismissed when there is time, at the latest with the next one."""
    on, off = ({"capabilities": [{"capability": "x-ignore-shared", "state": s}]} for s in (True, False))
    row = ["migrate-set-capabilities", "snapshot-load", "query-jobs", "query-status", "migrate-set-capabilities"]

    def script(peer: Peer) -> None:
        peer.greet()
        for dismissed in ([], ["job-dismiss"]):
            sent = [peer.hear() for _ in (*dismissed, *row)]
            assert [m["execute"] for m in sent] == [*dismissed, *row]
            assert [m["arguments"] for m in sent if m["execute"] == row[0]] == [on, off]
            answers: list[Any] = [{} for _ in dismissed] + [{}, {}, job_state("concluded"), {"status": "paused"}, {}]
            for message, answer in zip(sent, answers, strict=True):
                peer.say({"return": answer, "id": message["id"]})
        peer.answer({})
        peer.wait_for_end()

    with served(script) as (path, peers):
        with Qmp(path, 20.0) as qmp:
            for _ in range(2):
                after = [("query-status", {}), (row[0], off)]
                told = qmp.job("snapshot-load", {"tag": "t"}, 20.0, before=[(row[0], on)], after=after)  # type: ignore[arg-type,list-item]
                assert told == [{"status": "paused"}, {}]
            qmp.dismiss()
            qmp.dismiss()
    assert [m["execute"] for m in peers[0].heard][-2:] == [row[-1], "job-dismiss"]


ON, OFF = ({"capabilities": [{"capability": "x-ignore-shared", "state": s}]} for s in (True, False))
AHEAD = Ahead(
    "snapshot-load",
    {"tag": "t", "devices": ["a"]},
    [("migrate-set-capabilities", ON)],
    [("migrate-set-capabilities", OFF)],
)


def test_a_job_that_is_ahead_is_read_before_it_is_given() -> None:
    """QEMU does what comes before it at once and has all of it but its end, so that a death leaves no order."""
    read = threading.Event()

    def script(peer: Peer) -> None:
        peer.greet()
        for dismissed in (False, True):
            peer.answer({})  # to stop
            if dismissed:
                peer.answer({})
            peer.answer({})
            assert peer.heard[-1]["arguments"] == ON
            peer.await_unread('"devices":["a"]}')
            read.set()
            peer.answer({})
            peer.answer(job_state("concluded"))
            peer.answer({"status": "paused"})
        peer.answer({})
        peer.wait_for_end()

    with served(script) as (path, peers):
        with Qmp(path, 20.0) as qmp:
            for _ in range(2):
                read.clear()
                assert qmp.execute_all([("stop", {})], AHEAD) == [{}]
                assert read.wait(20)
                after: list[Command] = [("query-status", {})]
                told = qmp.job(AHEAD.job, AHEAD.arguments, 20.0, before=AHEAD.before, after=after)
                assert told == [{"status": "paused"}]
                assert qmp.heard() == frozenset()
            qmp.dismiss()
    row = ["migrate-set-capabilities", "snapshot-load", "query-jobs", "query-status"]
    heard = [m["execute"] for m in peers[0].heard[1:]]
    assert heard == ["stop", *row, "stop", "job-dismiss", *row, "job-dismiss"]
    assert peers[0].heard[3]["arguments"] == {"job-id": JOB_ID, **AHEAD.arguments}


@pytest.mark.parametrize("then", ["cont", "other job", "end"])
def test_what_is_ahead_and_not_given_is_taken_back_in_another_session(then: str) -> None:
    """The one has the beginning of an order, which nothing else may end."""
    answers: dict[str, list[object]] = {"cont": [{}], "other job": [{}, job_state("concluded"), {}], "end": []}

    def script(peer: Peer) -> None:
        peer.greet()
        peer.answer({})
        peer.answer({})
        peer.wait_for_end()

    def again(peer: Peer) -> None:
        peer.greet()
        peer.answer({})
        assert peer.heard[-1]["arguments"] == OFF
        for answer in answers[then]:
            peer.answer(answer)
        peer.wait_for_end()

    with served(script, again) as (path, peers):
        with Qmp(path, 20.0) as qmp:
            qmp.execute_all([("stop", {})], AHEAD)
            match then:
                case "cont":
                    qmp.execute("cont")
                case "other job":
                    qmp.job("snapshot-load", {"tag": "u"}, 20.0)
            qmp.dismiss()
            assert qmp.heard() == {"DEVICE_DELETED"}, "what happened meanwhile was not heard"
    assert [m["execute"] for m in peers[0].heard[1:]] == ["stop", "migrate-set-capabilities"]
    assert len(peers) == 2


def test_giving_up_what_is_ahead_and_not_answered_yet_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.answer({})
        peer.hear()
        peer.wait_for_end()

    def again(peer: Peer) -> None:
        peer.greet()
        peer.answer({})
        peer.wait_for_end()

    with served(script, again) as (path, _), Qmp(path, 20.0) as qmp:
        qmp.execute_all([("stop", {})], AHEAD)
        qmp.dismiss()
    gc.collect()
    assert caplog.messages == []


def test_when_a_guest_went_on_is_of_this_time() -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        for said in ("RESUME", "STOP"):
            command = peer.hear()
            peer.say({"event": said, "timestamp": {"seconds": 0, "microseconds": 0}})
            peer.say({"return": {}, "id": command["id"]})
        peer.wait_for_end()

    with served(script) as (path, _), Qmp(path, 20.0) as qmp:
        began = time.monotonic()
        first = qmp.go_on()
        assert began <= first <= time.monotonic()
        again = time.monotonic()
        assert qmp.go_on() >= again, "nobody said it this time: it was going on"
        assert qmp.heard() == {"RESUME", "STOP"}


def test_what_happens_unasked_is_heard_before_the_next_answer() -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.answer([])
        asked = peer.hear()
        for event in ("STOP", "RESUME"):
            peer.say({"event": event, "timestamp": {"seconds": 0, "microseconds": 0}})
        peer.say({"return": [], "id": asked["id"]})
        peer.answer([])
        peer.wait_for_end()

    with served(script) as (path, _), Qmp(path, 20.0) as qmp:
        heard = []
        for _ in range(3):
            qmp.execute("query-block")
            heard.append(qmp.heard())
    assert heard == [frozenset(), {"STOP", "RESUME"}, frozenset()]


@pytest.mark.parametrize("refused", range(3))
def test_a_refusal_in_a_row_of_commands_leaves_a_session_that_works(refused: int) -> None:
    """The answers to the others still come, and belong to nobody."""

    def script(peer: Peer) -> None:
        peer.greet()
        for number in range(3):
            peer.refuse("no") if number == refused else peer.answer([])
        peer.answer({"status": "running"})
        peer.wait_for_end()

    with served(script) as (path, _), Qmp(path, 20.0) as qmp:
        with pytest.raises(GuestError, match="no"):
            qmp.execute_all([("query-jobs", {}), ("query-block", {}), ("query-migrate", {})])
        assert qmp.execute("query-status") == {"status": "running"}


def test_a_failed_job_is_dismissed_and_told() -> None:
    dismissed = []

    def script(peer: Peer) -> None:
        peer.greet()
        peer.answer({})
        peer.answer(job_state("concluded", error="Error -22 while loading VM state"))
        peer.answer({})
        dismissed.append(peer.heard[-1]["arguments"])
        peer.wait_for_end()

    with pytest.raises(GuestError, match="snapshot-save failed: Error -22 while loading VM state"):
        run_job(script)
    assert dismissed == [{"id": JOB_ID}]


@pytest.mark.parametrize(("status", "dismissed"), [("concluded", True), ("running", False)])
def test_the_job_of_a_killed_hvctl_is_cleared(status: str, dismissed: bool) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.answer(job_state(status, error="old"))
        peer.answer({})
        peer.wait_for_end()

    with served(script) as (path, peers):
        with Qmp(path, 20.0) as qmp:
            qmp.dismiss_jobs()
    said = [(m["execute"], m.get("arguments")) for m in peers[0].heard][1:]
    assert said == [("query-jobs", None), *([("job-dismiss", {"id": JOB_ID})] if dismissed else [])]


def test_a_job_that_does_not_end_is_a_deadline() -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.answer({})
        peer.answer(job_state("running"))
        peer.answer(job_state("running"))
        peer.wait_for_end()

    with pytest.raises(DeadlineError):
        run_job(script, seconds=0.3)


def test_a_job_that_somebody_else_dismissed_has_no_result() -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.answer({})
        peer.answer([])
        peer.wait_for_end()

    with pytest.raises(GuestError, match="vanished"):
        run_job(script)


def test_closing_twice_and_in_the_middle_is_quiet() -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.wait_for_end()

    with served(script) as (path, _), Qmp(path, 20.0) as qmp:
        qmp.close()
        with pytest.raises(HvctlError):
            qmp.execute("query-status")


# --- a real peer


@contextmanager
def closing_pidfd(pid: int) -> Iterator[Callable[[], object]]:
    """A wait for the end of a process that is not our child."""
    fd = os.pidfd_open(pid)
    try:
        yield lambda: select.select([fd], [], [], 20)
    finally:
        os.close(fd)


@pytest.mark.host
def test_a_real_qemu(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    pidfile = tmp_path / "pid"
    # With -daemonize the command ends when the monitor is there.
    command = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S", "-daemonize"]
    command += ["-qmp", f"unix:{path},server=on,wait=off", "-pidfile", str(pidfile)]
    subprocess.run(command, check=True)
    pid = int(pidfile.read_text())
    try:
        for _ in range(3):
            with Qmp(str(path), 20.0) as qmp:
                assert qmp.execute("query-status")["status"] == "prelaunch"
                with pytest.raises(GuestError, match="Failed to find node"):
                    qmp.execute("blockdev-del", {"node-name": "none"})
                with pytest.raises(GuestError, match="No block device node"):
                    qmp.job("snapshot-delete", {"tag": "t", "devices": ["none"]}, 20.0)
                qmp.dismiss()
                assert qmp.execute("query-jobs") == []
    finally:
        with closing_pidfd(pid) as ended:
            os.kill(pid, 9)
            ended()
    with pytest.raises(UnreachableError), Qmp(str(path), 20.0):
        pass
