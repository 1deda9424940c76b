"""hvctl's command line run inside the test, as `hvctl` itself runs it, on a fake host."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from faults.command import FakeSite

from hvctl import __main__


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str


Run = Callable[..., Ran]


def runner(site: FakeSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    for name, value in {**site.environment, "SUDO_USER": "operator"}.items():
        monkeypatch.setenv(name, value)
    # What main() does to its own process is no business of this one.
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)

    def run(*argv: str) -> Ran:
        monkeypatch.setattr("sys.argv", ["hvctl", *argv])
        mask = os.umask(0o077)
        try:
            __main__.main()
            status = 0
        except SystemExit as e:
            status = int(e.code or 0)
        finally:
            os.umask(mask)
        said = capsys.readouterr()
        return Ran(status, said.out, said.err)

    return run
