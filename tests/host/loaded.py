"""hvctl commands forked from a process that has loaded hvctl: as real to kill as any, and Python starts only once.

The process itself opens nothing: it has no connection, no thread and no lock that a fork could share.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

MODULES = (
    "hvctl.cli.app", "hvctl.cli.render", "hvctl.engine.runtime", "hvctl.operations.inspect", "hvctl.operations.policy",
    "hvctl.operations.snapshot", "hvctl.operations.journal", "hvctl.adapters.archives", "hvctl.adapters.libvirt",
    "hvctl.adapters.machine", "hvctl.adapters.storage", "hvctl.adapters.store", "hvctl.adapters.traffic",
    "hvctl.adapters.fake", "hvctl.operations.allocate", "hvctl.operations.vm", "hvctl.operations.guard",
)  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """Give it commands; a negative status is the signal that ended one."""

    process: subprocess.Popen[str]

    def run(
        self, *argv: str, fault: str = "", env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """env: beside what all of them have."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"argv": argv, "fault": fault, "env": dict(env or {})}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
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


@contextmanager
def loaded(environment: Mapping[str, str]) -> Iterator[Loaded]:
    process = subprocess.Popen(
        [sys.executable, __file__],
        env={**os.environ, **environment, "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield Loaded(process)
    finally:
        process.communicate()
        assert process.returncode == 0


def _serve() -> None:
    import importlib

    from hvctl.__main__ import main

    for module in MODULES:
        importlib.import_module(module)
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if not child:
                _command(main, asked, out, err)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said = [_text(stream) for stream in (out, err)]
        print(json.dumps({"status": status, "out": said[0], "err": said[1]}), flush=True)


def _text(stream: IO[str]) -> str:
    stream.seek(0)
    return stream.read()


def _command(main: Any, asked: dict[str, Any], out: IO[str], err: IO[str]) -> None:
    """Ends the process, as the command would."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.environ.update(asked["env"], HVCTL_FAULT=asked["fault"])
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
