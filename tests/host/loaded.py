"""hvctl commands forked from a process that has loaded hvctl: as real to kill as any, and Python starts only once.

The process itself opens nothing: it has no connection, no thread and no lock that a fork could share.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Lock
from typing import IO, Any, cast

MODULES = (
    "hvctl.cli.app", "hvctl.cli.render", "hvctl.engine.runtime", "hvctl.operations.inspect", "hvctl.operations.policy",
    "hvctl.operations.snapshot", "hvctl.operations.journal", "hvctl.operations.allocate", "hvctl.operations.vm",
    "hvctl.operations.guard", "hvctl.adapters.fake", "hvctl.adapters.disks.storage", "hvctl.adapters.libvirt.host",
    "hvctl.adapters.network.traffic", "hvctl.adapters.snapshots.archives", "hvctl.adapters.snapshots.machine",
    "hvctl.adapters.store.store", "hvctl.operations.doctor", "hvctl.operations.interrupt", "hvctl.operations.comeback",
    "hvctl.operations.pool", "hvctl.adapters.node.hostprep", "hvctl.jobs.catalog",
    # What these load when they are first used: a new database is migrated, one is opened, an argument is read.
    "alembic.command", "alembic.ddl.sqlite", "sqlalchemy.dialects.sqlite", "pydantic.dataclasses", "typer._adapters",
    "rich.cells",
)  # fmt: skip


_asking = Lock()


@dataclass(frozen=True)
class Loaded:
    """Give it commands; a negative status is the signal that ended one. The environment is beside the test's own."""

    environment: Mapping[str, str] = field(default_factory=dict)

    def run(
        self, *argv: str, fault: str = "", env: Mapping[str, str] | None = None, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """env: beside what all of them have."""
        environment = {**os.environ, **self.environment, "HVCTL_FAULT": fault, **(env or {})}
        request = {"argv": argv, "env": environment, "stdin": stdin, "folder": str(Path.cwd())}
        process = _server()
        assert process.stdin
        assert process.stdout
        with _asking:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
        return subprocess.CompletedProcess(argv, answer["status"], answer["out"], answer["err"])

    def ok(self, *argv: str) -> str:
        done = self.run(*argv)
        assert done.returncode == 0, (argv, done.returncode, done.stdout, done.stderr)
        return str(done.stdout)

    def json(self, *argv: str) -> Any:
        document = json.loads(self.ok("-f", "json", *argv))
        document.pop("schema_version")
        (only,) = document.values()
        return only


@cache
def _server() -> subprocess.Popen[str]:
    """One for all tests of this process; it ends with its input."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    atexit.register(process.communicate)
    return process


def _serve() -> None:
    import importlib

    import typer.main
    from typer.core import TyperGroup

    from hvctl.__main__ import main

    for module in MODULES:
        importlib.import_module(module)
    from hvctl.cli.app import app

    # A good part of what a command takes is to build the tree that it stands in.
    tree = typer.main.get_command(app)
    assert isinstance(tree, TyperGroup)
    assert list(tree.commands.values())
    typer.main.get_command = lambda _: tree
    for line in sys.stdin:
        asked = json.loads(line)
        with ExitStack() as files:
            stdin, out, err = (files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3))
            stdin.write(asked["stdin"])
            stdin.flush()
            stdin.seek(0)
            child = os.fork()
            if not child:
                _command(main, asked, stdin, out, err)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said = [_text(stream) for stream in (out, err)]
        print(json.dumps({"status": status, "out": said[0], "err": said[1]}), flush=True)


def _text(stream: IO[str]) -> str:
    stream.seek(0)
    return stream.read()


def _command(main: Any, asked: dict[str, Any], stdin: IO[str], out: IO[str], err: IO[str]) -> None:
    """Ends the process, as the command would."""
    for number, stream in enumerate((stdin, out, err)):
        os.dup2(stream.fileno(), number)
    sys.stdin = os.fdopen(0, closefd=False)  # without what this process has read ahead of its own
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.argv = ["hvctl", *asked["argv"]]
    status = 1
    try:
        main()
        status = 0
    except SystemExit as e:
        status = cast(int, e.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    _serve()
