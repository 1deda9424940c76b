"""A sign of life: the host's half against FIFOs, QEMU and the guest played by the test, and the guest's program."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvctl.adapters.guest import notice
from hvctl.adapters.guest.pulse import ENTROPY, Done, Hearing, Pulse, discard, ends, new_nonce, tell
from hvctl.adapters.images.imagepulse import answer_program
from hvctl.errors import DeadlineError, GuestError, HvctlError, UnreachableError

SEED = bytes(range(ENTROPY))
NONCE = "0123456789abcdef" * 2
TIME = 1_700_000_000_000_000_123


class Qemu:
    """The other end of the FIFOs, open for both directions as QEMU has them."""

    def __init__(self, path: str) -> None:
        for end in ends(path):
            os.mkfifo(end, 0o600)
        self.into, self.out = (os.open(end, os.O_RDWR | os.O_NONBLOCK) for end in ends(path))

    def says(self, data: bytes) -> int:
        return os.write(self.out, data)

    def heard(self) -> bytes:
        with suppress(BlockingIOError):
            return os.read(self.into, 1 << 16)
        return b""

    def fill(self) -> int:
        """As a guest that does not read leaves it."""
        with suppress(BlockingIOError):
            return os.write(self.into, b"x")
        return 0

    def close(self) -> None:
        os.close(self.into)
        os.close(self.out)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "pulse")


@pytest.fixture
def qemu(path: str) -> Iterator[Qemu]:
    made = Qemu(path)
    yield made
    with suppress(OSError):
        made.close()


def test_a_line_goes_out_whole_and_the_answer_is_taken(path: str, qemu: Qemu) -> None:
    with Pulse(path) as pulse:
        pulse.send(NONCE, SEED, TIME)
        assert qemu.heard() == f"\nlife {NONCE} 1700000000.000000123 {SEED.hex()}\n".encode()
        qemu.says(f"\nlife {NONCE}\n".encode())
        assert pulse.await_life(NONCE, 10) >= 0
        qemu.says(f"done {NONCE} reseed=ok clock=no\n".encode())
        assert pulse.await_done(NONCE, 10) == Done(reseeded=True, clock_set=False)


def test_without_a_time_the_clock_is_left_alone(path: str, qemu: Qemu) -> None:
    with Pulse(path) as pulse:
        pulse.send(NONCE, SEED)
        assert f"{NONCE} 0000000000.000000000 ".encode() in qemu.heard()


def test_an_answer_may_come_in_pieces_and_after_noise(path: str, qemu: Qemu) -> None:
    answer = b"\x00\x1b]0;x\x07\xff\xfe" * 50 + f"\nlife {NONCE}\ndone {NONCE} reseed=ok clock=ok\n".encode()

    def dribble() -> None:
        for i in range(0, len(answer), 7):
            qemu.says(answer[i : i + 7])

    with Pulse(path) as pulse:
        writer = threading.Thread(target=dribble)
        writer.start()
        pulse.await_life(NONCE, 10)
        assert pulse.await_done(NONCE, 10) == Done(True, True)
        writer.join()


def test_what_was_said_before_does_not_count(path: str, qemu: Qemu) -> None:
    """In both directions: the guest of the reset before, and the line that nobody read."""
    os.write(qemu.into, b"\nlife stale\n")
    qemu.says(f"life {NONCE}\n".encode() * 100)
    with Pulse(path) as pulse:
        assert qemu.heard() == b""
        with pytest.raises(DeadlineError, match="did not show a sign of life"):
            pulse.await_life(NONCE, 0)


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(f"life {new_nonce()}", id="another nonce"),
        f"life {NONCE[:-1]}",
        f"life {NONCE}0",
        f"xlife {NONCE}",
        f"life {NONCE.upper()}",
        f"life  {NONCE}",
        f"done {NONCE} reseed=ok clock=ok",
        "life",
        "",
    ],
)
def test_only_the_nonce_itself_is_life(path: str, qemu: Qemu, said: str) -> None:
    with Pulse(path) as pulse:
        pulse.send(NONCE, SEED)
        qemu.says(f"\n{said}\n".encode())
        with pytest.raises(DeadlineError):
            pulse.await_life(NONCE, 0.01)


@given(said=st.binary(max_size=2000))
def test_hostile_bytes_are_never_life_and_never_shown(tmp_path_factory: pytest.TempPathFactory, said: bytes) -> None:
    path = str(tmp_path_factory.mktemp("pulse") / "p")
    qemu = Qemu(path)
    try:
        with Pulse(path) as pulse:
            qemu.says(said)
            with pytest.raises(HvctlError) as e:
                pulse.await_life(NONCE, 0)
            assert str(e.value).isascii()
            assert str(e.value).isprintable()
    finally:
        qemu.close()


def test_words_that_are_not_ok_are_no(path: str, qemu: Qemu) -> None:
    for said, done in (
        ("reseed=no clock=no", Done(False, False)),
        ("reseed=okay clock=OK", Done(False, False)),
        ("", Done(False, False)),
        ("clock=ok more=words reseed=ok", Done(True, True)),
    ):
        with Pulse(path) as pulse:
            qemu.says(f"done {NONCE} {said}\n".encode())
            assert pulse.await_done(NONCE, 10) == done


def test_a_guest_that_floods_is_cut_off(path: str, qemu: Qemu) -> None:
    over = threading.Event()

    def flood() -> None:
        while not over.is_set():
            with suppress(BlockingIOError):
                qemu.says(b"life \n" * 600)

    with Pulse(path) as pulse:
        writer = threading.Thread(target=flood)
        writer.start()
        try:
            with pytest.raises(GuestError, match="floods"):
                pulse.await_life(NONCE, 60)
        finally:
            over.set()
            writer.join()


def test_a_guest_that_does_not_read_blocks_nobody(path: str, qemu: Qemu) -> None:
    with Pulse(path) as pulse, pytest.raises(UnreachableError, match="does not read"):
        for _ in range(10_000):
            pulse.send(new_nonce(), SEED)
    # What nobody read is gone with the next session, which can write again.
    with Pulse(path) as pulse:
        pulse.send(NONCE, SEED)
        assert NONCE.encode() in qemu.heard()


def test_discarding_tells_when_there_is_nothing_left(path: str, qemu: Qemu) -> None:
    qemu.says(b"x" * 5000)
    os.write(qemu.into, b"kept")
    assert [discard(path), discard(path)] == [5000, 0]
    assert qemu.heard() == b"kept"


def test_a_qemu_that_is_gone_is_told(path: str, qemu: Qemu) -> None:
    with Pulse(path) as pulse:
        qemu.close()
        with pytest.raises(UnreachableError, match="no QEMU"):
            pulse.send(NONCE, SEED)
        with pytest.raises(UnreachableError, match="ended"):
            pulse.await_life(NONCE, 60)
    with pytest.raises(UnreachableError, match="no QEMU"), Pulse(path):
        pass


def test_only_fifos_are_opened(path: str, tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="No such file"), Pulse(path):
        pass
    Qemu(str(tmp_path / "real"))
    for end in ("in", "out"):
        Path(f"{path}.{end}").symlink_to(tmp_path / f"real.{end}")
    with pytest.raises(UnreachableError, match="symbolic"), Pulse(path):
        pass
    for end in ("in", "out"):
        Path(f"{path}.{end}").unlink()
        Path(f"{path}.{end}").write_text("precious")
    with pytest.raises(HvctlError, match="not a FIFO"), Pulse(path):
        pass
    assert Path(f"{path}.in").read_text() == "precious"


def test_a_line_is_told_and_what_nobody_took_is_said(path: str, qemu: Qemu) -> None:
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(tell, path, "notice interruption save")
        heard = b""
        while not heard:
            heard = qemu.heard()
        assert (told.result(30), heard) == (True, b"\nnotice interruption save\n")
    assert tell(path, "notice withdrawn save") is False
    assert qemu.heard() == b"\nnotice withdrawn save\n", "it finds it later"
    while qemu.fill():
        pass
    with pytest.raises(UnreachableError, match="does not read"):
        tell(path, "notice interruption save")
    qemu.close()
    with pytest.raises(UnreachableError, match="no QEMU"):
        tell(path, "notice interruption save")


@pytest.fixture
def hearing() -> Iterator[Hearing]:
    made = Hearing()
    yield made
    made.close()


def test_a_guest_is_heard_as_soon_as_it_says_the_line(path: str, qemu: Qemu, hearing: Hearing) -> None:
    """In pieces over several calls, too, and behind whatever else it says."""
    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(hearing.hear, path, f"ready {NONCE}", 3600)
        qemu.says(f"\nlife {NONCE}\nready {new_nonce()}\n\xff\x00\x1b".encode("latin-1") + b"x" * 2000)
        qemu.says(f"\nready {NONCE}\nrea".encode())
        assert heard.result(30)
    assert not hearing.hear(path, f"ready {NONCE}", 0), "once"
    qemu.says(f"dy {NONCE}\n".encode())
    assert hearing.hear(path, f"ready {NONCE}", 0)


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(f"ready {new_nonce()}", id="another notice"),
        f"ready {NONCE[:-1]}",
        f"ready {NONCE}0",
        f"ready {NONCE} ",
        f"xready {NONCE}",
        f"ready {NONCE.upper()}",
        f"ready  {NONCE}",
        f"ready\t{NONCE}",
        f"notice ready {NONCE}",
        "ready",
        f"life {NONCE}",
    ],
)
def test_only_the_line_itself_is_the_guests_word(path: str, qemu: Qemu, hearing: Hearing, said: str) -> None:
    qemu.says(f"\n{said}\n".encode())
    assert not hearing.hear(path, f"ready {NONCE}", 0)


@given(said=st.binary(max_size=2000))
def test_hostile_bytes_are_never_the_guests_word(tmp_path_factory: pytest.TempPathFactory, said: bytes) -> None:
    path, hearing = str(tmp_path_factory.mktemp("pulse") / "p"), Hearing()
    qemu = Qemu(path)
    try:
        qemu.says(said)
        assert not hearing.hear(path, f"ready {NONCE}", 0)
        # And whatever it was, it does not hide what comes after it.
        qemu.says(f"\nready {NONCE}\n".encode())
        assert hearing.hear(path, f"ready {NONCE}", 0)
    finally:
        hearing.close()
        qemu.close()


def test_a_guest_that_floods_is_not_heard_any_more(path: str, qemu: Qemu, hearing: Hearing) -> None:
    def flood() -> int:
        with suppress(BlockingIOError):
            return qemu.says(b"ready\n" * 600)
        return 0

    with pytest.raises(GuestError, match="floods"):
        while flood():
            hearing.hear(path, f"ready {NONCE}", 0)
    flood()
    left = discard(path)
    assert left
    qemu.says(f"\nready {NONCE}\n".encode())
    with pytest.raises(GuestError, match="floods"):
        hearing.hear(path, f"ready {NONCE}", 0)
    assert discard(path) == len(NONCE) + 8, "nothing more is read"
    hearing.close()
    qemu.says(f"\nready {NONCE}\n".encode())
    assert hearing.hear(path, f"ready {NONCE}", 0), "in another operation"


def test_what_is_said_of_an_interruption_is_no_sign_of_life(path: str, qemu: Qemu, hearing: Hearing) -> None:
    """Nor does it hide one, before it and behind it, or is hidden by the greeting that was before."""
    ready = f"\nready {NONCE}\n".encode()
    with Pulse(path) as pulse:
        pulse.send(NONCE, SEED)
        qemu.says(ready)
        with pytest.raises(DeadlineError):
            pulse.await_life(NONCE, 0)
        qemu.says(ready + f"\nlife {NONCE}\n".encode() + ready + f"done {NONCE} reseed=ok clock=ok\n".encode() + ready)
        pulse.await_life(NONCE, 0)
        assert pulse.await_done(NONCE, 0).reseeded
    qemu.says(ready)
    assert hearing.hear(path, f"ready {NONCE}", 0)


def test_a_port_without_a_qemu_is_not_heard(path: str, qemu: Qemu, hearing: Hearing) -> None:
    assert not hearing.hear(path, f"ready {NONCE}", 0)
    qemu.close()
    with pytest.raises(UnreachableError, match="ended"):
        hearing.hear(path, f"ready {NONCE}", 3600)
    with pytest.raises(UnreachableError, match="No such file"):
        hearing.hear(f"{path}-other", f"ready {NONCE}", 0)


def test_nothing_stays_open(path: str, qemu: Qemu, hearing: Hearing) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with Pulse(path):
            pass
        discard(path)
        tell(path, "notice")
        hearing.hear(path, "ready", 0)
        hearing.close()
    qemu.close()
    for _ in range(3):
        with suppress(UnreachableError), Pulse(path):
            pass
        with suppress(UnreachableError):
            tell(path, "notice")
        with suppress(UnreachableError):
            hearing.hear(f"{path}-other", "ready", 0)
    assert len(list(Path("/proc/self/fd").iterdir())) == before - 2


def test_a_nonce_or_entropy_of_another_length_is_a_mistake(path: str, qemu: Qemu) -> None:
    with Pulse(path) as pulse:
        for nonce, seed in (("short", SEED), (NONCE, SEED[1:])):
            with pytest.raises(ValueError, match="64 bytes"):
                pulse.send(nonce, seed)
    assert qemu.heard() == b""


# --- the guest's program

ONLY_HERE = pytest.mark.skipif(platform.machine() != "x86_64", reason="the program is for x86-64")


class Guest:
    """The program, with a socket for its port and whatever `random` is for its random generator."""

    def __init__(self, folder: Path, random: str, argv: tuple[str, ...] = ()) -> None:
        program = folder / "answer"
        program.write_bytes(answer_program(str(folder / "notice.line")))
        program.chmod(0o755)
        self.port, other = socket.socketpair()
        self.port.settimeout(30)
        with other:
            # By a shell, since descriptor 3 may be taken in this process.
            shell = ["sh", "-c", 'exec "$@" 3>' + random, "sh", *argv, str(program)]
            self.process = subprocess.Popen(shell, stdin=other)

    def answer(self) -> bytes:
        got = b""
        while not got.endswith(b"\n") or b"done" not in got:
            more = self.port.recv(4096)
            assert more, got
            got += more
        return got

    def end(self) -> int:
        self.port.close()
        return self.process.wait(30)


def line(nonce: str, time_ns: int = 0) -> bytes:
    return f"\nlife {nonce} {time_ns // 10**9:010}.{time_ns % 10**9:09} {SEED.hex()}\n".encode()


@ONLY_HERE
def test_the_program_answers_what_the_host_expects(tmp_path: Path) -> None:
    """/dev/null takes no ioctl: what could not be done is said."""
    guest = Guest(tmp_path, "/dev/null")
    for nonce in (new_nonce(), new_nonce()):
        guest.port.send(line(nonce))
        assert guest.answer() == f"\nlife {nonce}\ndone {nonce} reseed=no clock=no\n".encode()
    assert guest.end() == 1  # and init starts it again


@ONLY_HERE
def test_the_program_takes_a_line_in_pieces_and_after_noise(tmp_path: Path) -> None:
    guest = Guest(tmp_path, "/dev/null")
    noise = (b"", b"life 0123", b"\n" * 5, b"x" * 500, b"x" * 512, b"x" * 5000, line(new_nonce())[:100], b"\0\xff\n")
    for before in noise:
        nonce = new_nonce()
        whole = before + line(nonce)
        for i in range(0, len(whole), 50):
            guest.port.send(whole[i : i + 50])
        # Noise alone may fill its input together with a part of the line: then the next line is the first that counts.
        guest.port.send(line(nonce))
        assert guest.answer().startswith(f"\nlife {nonce}\n".encode())
        second = new_nonce()
        guest.port.send(line(second))
        while second.encode() not in guest.answer():
            pass
    guest.end()


@ONLY_HERE
def test_of_two_lines_at_once_the_last_counts(tmp_path: Path) -> None:
    guest = Guest(tmp_path, "/dev/null")
    old, new = new_nonce(), new_nonce()
    guest.port.send(line(old) + line(new))
    assert guest.answer().startswith(f"\nlife {new}\n".encode())
    guest.end()


@ONLY_HERE
def test_the_program_keeps_a_notice_and_answers_as_before(tmp_path: Path) -> None:
    guest, kept = Guest(tmp_path, "/dev/null"), tmp_path / "notice.line"
    told = {"event": "interruption", "how": "power-off", "at": "a", "returns": "b", "id": NONCE, "reason": "c" * 500}
    for words in (notice.line(told), f"notice withdrawn save a b {NONCE} for ci-9"):
        guest.port.send(f"\n{words}\n".encode())
        nonce = new_nonce()
        while not kept.exists() or kept.read_text() != f"{words}\n":
            assert guest.process.poll() is None
        guest.port.send(line(nonce))
        assert guest.answer().startswith(f"\nlife {nonce}\n".encode())
    guest.end()


@ONLY_HERE
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may credit entropy")
def test_the_program_reseeds_and_a_clock_it_may_not_set_is_said(tmp_path: Path) -> None:
    """Without the right to set the clock: it is this machine's."""
    guest = Guest(tmp_path, "/dev/urandom", ("setpriv", "--bounding-set", "-sys_time", "--inh-caps", "-sys_time"))
    nonce = new_nonce()
    guest.port.send(line(nonce, TIME))
    assert guest.answer() == f"\nlife {nonce}\ndone {nonce} reseed=ok clock=no\n".encode()
    guest.end()
