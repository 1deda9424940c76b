"""vm exec and vm console: a program, and a terminal, inside a real guest."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from host.outside import Guest, await_true, virsh
from host.site import SECONDS, Site

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]


def test_exec_gives_both_streams_and_the_programs_exit_status(site: Site, vm: Guest) -> None:
    done = site.run("vm", "exec", vm.name, "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert site.run("vm", "exec", vm.name, "true").returncode == 0


def test_exec_says_which_signal_ended_the_program(site: Site, vm: Guest) -> None:
    done = site.run("-f", "json", "vm", "exec", vm.name, "--", "sh", "-c", "kill -9 $$")
    assert (done.returncode, json.loads(done.stdout)["exec"]["signal"]) == (137, 9)


def test_exec_gives_its_input_only_when_asked(site: Site, vm: Guest) -> None:
    assert site.ok("vm", "exec", vm.name, "--stdin", "--", "cat", stdin="a\nb") == "a\nb"
    assert site.ok("vm", "exec", vm.name, "--", "cat", stdin="a\nb") == ""


def test_exec_cuts_each_stream_and_says_so(site: Site, vm: Guest) -> None:
    script = "echo 123456789; echo abcdefghi >&2"
    done = site.run("vm", "exec", vm.name, "--max-output", "4B", "--", "sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, "1234")
    assert done.stderr == "abcdwarning: output beyond 4B a stream was cut\n"
    assert site.run("-q", "vm", "exec", vm.name, "--max-output", "4B", "--", "sh", "-c", script).stderr == "abcd"


def test_exec_has_a_deadline_and_leaves_the_program_alone(site: Site, vm: Guest) -> None:
    assert "still runs" in site.refused(
        6, "vm", "exec", vm.name, "--timeout", "0.5", "--", "sh", "-c", "echo $$ > /run/late; exec sleep 777"
    )
    vm.run("kill $(cat /run/late)")


def test_exec_of_a_program_that_is_not_there_or_a_vm_that_does_not_run(site: Site, vm: Guest) -> None:
    assert "/nowhere" in site.refused(1, "vm", "exec", vm.name, "--", "/nowhere")
    virsh("suspend", vm.uuid)
    try:
        assert "paused" in site.refused(5, "vm", "exec", vm.name, "--", "true")
    finally:
        virsh("resume", vm.uuid)


class Terminal:
    """The other end of a pseudo-terminal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.seen = b""

    def type(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def reads(self, seconds: float) -> bool:
        """Whether something came."""
        if not select.select([self._fd], [], [], seconds)[0]:
            return False
        try:
            part = os.read(self._fd, 65536)
        except OSError:  # the last one on the other end closed it
            return False
        self.seen += part
        return bool(part)

    def await_answer(self, keys: bytes, text: bytes) -> None:
        """What a person does whose keys do nothing: press them again."""
        until = time.monotonic() + SECONDS
        while text not in self.seen:
            assert time.monotonic() < until, self.seen
            self.type(keys)
            self.reads(1)

    def await_text(self, text: bytes) -> None:
        until = time.monotonic() + SECONDS
        while text not in self.seen:
            assert time.monotonic() < until, self.seen
            self.reads(1)


@contextmanager
def terminal(site: Site, *argv: str) -> Iterator[tuple[subprocess.Popen[bytes], Terminal]]:
    """A command of hvctl on a terminal of its own."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            site.command(argv),
            env={**os.environ, **site.environment, "TERM": "dumb"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        yield process, Terminal(ours)
        process.kill()
        process.wait()
    finally:
        os.close(ours)


def test_console_reaches_the_guests_shell_and_lets_go(site: Site, vm: Guest) -> None:
    with terminal(site, "vm", "console", vm.name) as (process, screen):
        screen.await_text(b"Escape character is ^]")
        screen.await_answer(b"\r", b"# ")  # A shell that is just being started drops what was typed before.
        screen.type(b"echo $((6 * 7))-answers\r")
        screen.await_text(b"42-answers")
        screen.type(b"\x1d")
        await_true(lambda: not screen.reads(0.1) and process.poll() is not None, "virsh console ends")
        assert process.returncode == 0
    assert vm.state == "running"


def test_console_of_a_vm_that_is_off(site: Site) -> None:
    with site.created() as guest:
        assert "has no console" in site.refused(5, "vm", "console", guest.name)


def test_control_characters_of_a_guest_do_not_act_on_the_terminal(site: Site, vm: Guest) -> None:
    with terminal(site, "vm", "exec", vm.name, "--", "printf", r"\033[31mred\n") as (process, screen):
        await_true(lambda: not screen.reads(0.1) and process.poll() is not None, "hvctl ends")
        assert process.returncode == 0
        assert b"\x1b" not in screen.seen
        assert rb"\x1b[31mred" in screen.seen
