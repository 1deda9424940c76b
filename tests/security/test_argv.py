"""Whatever is typed, a command ends with a status and a sentence: random words of the real grammar on a fake host."""

from __future__ import annotations

import io
import itertools
import os
import random
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from faults.command import FakeSite

from hvctl import __main__ as entry
from hvctl.adapters.node.kvmprobe import kvm_boots  # noqa: F401 - loaded before the process's streams are replaced
from hvctl.errors import Exit

pytestmark = pytest.mark.processes

RUNS = 320
STATUSES = {int(e) for e in Exit}

NAMES = ["a", "b", "gone", "A", "", "-", "--", "../../etc/passwd", "a\nb", "\x1b[2J", "a" * 300, "\udcff", "é", "%s",
         "*", "' OR 1=1 --", "<vm/>", "00000000-0000-0000-0000-000000000000", "/etc/shadow", "a,b=c", "$(id)",
         "s1"]  # fmt: skip
NUMBERS = [
    "0",
    "1",
    "2",
    "4",
    "-1",
    "99999999999999999999999",
    "1e3",
    "0x10",
    "1.5",
    "nan",
    "inf",
    "",
    "٣",
    " 1",
    "none",
]
SIZES = [
    "256MiB",
    "1GiB",
    "1",
    "-1MiB",
    "0MiB",
    "0.1MiB",
    "1e9GiB",
    "9999999PiB",
    "MiB",
    "",
    "1 GiB",
    "none",
    "1GB ;id",
]
RATES = [
    "20Mbit",
    "1Gbit",
    "0bit",
    "none",
    "1",
    "9999999999Tbit",
    "-1Mbit",
    "20Mbit/s",
    "",
    "\x00x".replace("\x00", ""),
]
PERCENTS = ["150%", "0%", "999999%", "-5%", "150", "%", "none", "1e2%"]
DISKS = ["data:64MiB", "none", "x", ":", "../x:1MiB", "a:1", "a:1B", "root:1GiB", "a:0MiB", "A:1MiB", "b:9999PiB"]
LABELS = ["k=v", "k", "=v", "k=", "../k=v", "k=\x1b[0m", "k=" + "v" * 300, "é=1", "k=a=b"]

COMMANDS: dict[str, tuple[tuple[str, ...], dict[str, list[str] | None]]] = {
    "vm create": (("name",), {
        "--image": ["micro", "debian", "", "../micro"], "--vcpus": NUMBERS, "--max-vcpus": NUMBERS, "--memory": SIZES,
        "--max-memory": SIZES, "--disk": DISKS, "--nic": NAMES, "--label": LABELS, "--start": None, "--dry-run": None,
        "--exit-code": None}),
    "vm list": ((), {}),
    "vm show": (("name",), {}),
    "vm start": (("name",), {"--dry-run": None, "--exit-code": None}),
    "vm stop": (("name",), {
        "--force": None, "--seconds": ["0.1", "nan", "inf", "-1", "0", "x", "1e300"], "--dry-run": None}),
    "vm delete": (("name",), {"--force": None, "--dry-run": None, "--exit-code": None}),
    "vm exec": (("name", "word"), {
        "--timeout": ["0.1", "nan", "inf", "-1", "x"], "--max-output": SIZES, "--stdin": None}),
    "vm console": (("name",), {}),
    "vm adopt": (("name",), {"--yes": None, "--exit-code": None}),
    "vm protect": (("name",), {"--off": None, "--dry-run": None}),
    "allocate": (("name",), {
        "--vcpus": NUMBERS, "--cpu-quota": PERCENTS, "--cpu-weight": NUMBERS, "--memory": SIZES, "--net-in": RATES,
        "--net-out": RATES, "--nic": NAMES, "--iops": NUMBERS, "--disk-rate": SIZES, "--iops-burst": NUMBERS,
        "--disk-burst": SIZES, "--burst-seconds": NUMBERS, "--disk": NAMES, "--force": None, "--best-effort": None,
        "--diff": None, "--dry-run": None, "--exit-code": None}),
    "snapshot take": (("name", "name"), {"--dry-run": None}),
    "snapshot list": (("name",), {}),
    "snapshot show": (("name", "name"), {}),
    "snapshot delete": (("name", "name"), {"--dry-run": None}),
    "reset": (("name",), {"--to": NAMES, "--dry-run": None, "--exit-code": None}),
    "operation list": ((), {"--vm": NAMES, "--state": ["done", "open", "x", ""], "--limit": NUMBERS}),
    "operation show": (("number",), {}),
    "recover": ((), {}),
    "image list": ((), {}),
    "image delete": (("name",), {"--dry-run": None}),
    "doctor": ((), {"--probe": ["drift", "x", ""]}),
    "config show": ((), {}),
    "nonsense": (("name",), {}),
}  # fmt: skip
WORDS = {"name": NAMES, "number": NUMBERS, "word": NAMES}


def argv(dice: random.Random) -> list[str]:
    words: list[str] = []
    if dice.random() < 0.5:
        words += ["-f", dice.choice(["json", "yaml", "csv", "table", "xml"])]
    if dice.random() < 0.2:
        words += ["--key", dice.choice(NAMES)]
    if dice.random() < 0.05:
        words += [
            "-c",
            dice.choice(["qemu+tcp://x/system", "fake://", "fake:///nowhere/x.json", "", "\x1b]0;x", "test:///x"]),
        ]
    command = dice.choice(list(COMMANDS))
    arguments, options = COMMANDS[command]
    words += command.split()
    for option, values in options.items():
        if dice.random() < 0.4:
            words += [option] if values is None else [option, dice.choice(values)]
    if command == "doctor":
        words += ["--probe", "drift"]  # the others look at the machine that runs the tests
    for kind in arguments:
        likely = ["a", "b"] if kind == "name" and dice.random() < 0.5 else WORDS[kind]
        words.append(dice.choice(likely))
    return words


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSite]:
    from faults.test_kills import _image

    made = FakeSite(tmp_path / "state")
    made.folder.mkdir()
    _image(made)
    for name, value in {**made.environment, "HVCTL_LOCK_WAIT": "0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "execv", lambda path, words: sys.exit(0))
    mask = os.umask(0o022)
    yield made
    os.umask(mask)


def run(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> tuple[int, str, str]:
    """Status and both streams of the command; what it does not catch itself passes through."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    monkeypatch.setattr(sys, "argv", ["hvctl", *words])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"input")))
    status: object = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            entry.main()
        except SystemExit as e:
            status = e.code
    for stream in (out, err):
        stream.flush()
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return int(str(status or 0)), *texts


@pytest.mark.parametrize("seed", range(4))
def test_t26_no_argument_ends_in_a_traceback_or_reaches_the_terminal_raw(
    seed: int, site: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(seed)
    first = [["vm", "create", name, "--image", "micro", "--nic", "br0", "--start"] for name in ("a", "b")]
    seen: set[int] = set()
    for words in itertools.chain(first, (argv(dice) for _ in range(RUNS // 4))):
        status, out, err = run(monkeypatch, words)
        seen.add(status)
        assert status in STATUSES, (words, status, err)
        assert "Traceback" not in out + err, (words, err)
        assert "\x1b" not in out + err, (words, out, err)
        if status not in (0, int(Exit.CHANGES_PENDING)):
            assert err.strip() or out.strip(), words
    assert seen >= {int(Exit.DONE), int(Exit.USAGE), int(Exit.NOT_FOUND)}
    assert run(monkeypatch, ["recover"])[0] == 0
