"""The command's entry: runs the CLI, and renders every hvctl error as one sentence, a hint and its exit status."""

from __future__ import annotations

import io
import os
import resource
import sys


def main() -> None:
    from hvctl.errors import HvctlError

    os.umask(0o077)
    # What hvctl reads of guests must not end in a core file, and what a terminal cannot show must not end a command.
    # The hard limit stays: a libvirtd that hvctl starts inherits it, and sets one of its own for QEMU.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        for word in sys.argv:
            _refuse_bytes(word)
        from hvctl.cli.app import app

        app()
    except HvctlError as e:
        _trace()
        from hvctl.cli.render import complain

        complain(e)
        sys.exit(e.exit)
    except BrokenPipeError:
        # The reader of our output is gone (head, less): what it wanted was written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:
        # The net under the adapters: what the system refuses is never a traceback.
        _trace()
        from hvctl.cli.render import complain
        from hvctl.errors import UnreachableError

        where = f"{e.filename}: " if e.filename else ""
        denied = isinstance(e, PermissionError)
        error = UnreachableError(f"{where}{e.strerror or e}.", "run hvctl as root" if denied else "hvctl doctor")
        complain(error)
        sys.exit(error.exit)


def _trace() -> None:
    """With --debug, which is hvctl's own only before the program of `vm exec`; the exit status stays what it is."""
    words = sys.argv[: sys.argv.index("--")] if "--" in sys.argv else sys.argv
    if "--debug" in words:
        import traceback

        traceback.print_exc()


def _refuse_bytes(word: str) -> None:
    """Neither libvirt nor JSON nor the journal can carry what is not text."""
    from hvctl.errors import UsageError

    try:
        word.encode()
    except UnicodeEncodeError as e:
        raise UsageError(f"the argument {word!r} is not UTF-8 text.") from e


if __name__ == "__main__":
    main()
