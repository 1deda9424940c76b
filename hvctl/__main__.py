"""The command's entry: runs the CLI, and renders every hvctl error as one sentence, a hint and its exit status."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvctl.errors import HvctlError


def main() -> None:
    from hvctl.cli.output import own_output

    os.umask(0o077)
    # What hvctl reads of guests must not end in a core file. The hard limit stays: a libvirtd that hvctl starts
    # inherits it, and sets one of its own for QEMU.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    own_output()
    status = _ended(_command)
    lost = _ended(sys.stdout.flush)
    sys.exit(status or lost)


def _command() -> None:
    for word in sys.argv:
        _refuse_bytes(word)
    from hvctl.cli.app import app

    app()


def _ended(do: Callable[[], object]) -> int | str | None:
    """The exit status that it ends with, after what went wrong was said."""
    from hvctl.cli.output import ReaderGoneError, drop_output
    from hvctl.errors import HvctlError, OutputError

    try:
        do()
    except SystemExit as e:
        return e.code
    except HvctlError as e:
        if isinstance(e, OutputError):
            drop_output()
        return _complained(e)
    except ReaderGoneError:
        drop_output()
    except OSError as e:
        # The net under the adapters: what the system refuses is never a traceback.
        from hvctl.errors import UnreachableError

        where = f"{e.filename}: " if e.filename else ""
        hint = "run hvctl as root" if isinstance(e, PermissionError) else "hvctl doctor"
        return _complained(UnreachableError(f"{where}{e.strerror or e}.", hint))
    return 0


def _complained(error: HvctlError) -> int:
    from hvctl.cli.render import complain

    _trace()
    complain(error)
    return error.exit


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
