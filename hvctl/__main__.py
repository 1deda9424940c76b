"""The command's entry: runs the CLI, and renders every hvctl error as one sentence, a hint and its exit status."""

from __future__ import annotations

import os
import sys


def main() -> None:
    from hvctl.errors import HvctlError

    os.umask(0o077)
    try:
        from hvctl.cli.app import app

        app()
    except HvctlError as e:
        if "--debug" in sys.argv:
            raise
        from hvctl.cli.render import complain

        complain(e)
        sys.exit(e.exit)
    except BrokenPipeError:
        # The reader of our output is gone (head, less): what it wanted was written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
