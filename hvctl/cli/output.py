"""Standard output. What cannot be written to it is an error of its own: what was asked for has been done all the same,
and whoever reads exit statuses must be able to tell."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hvctl.errors import OutputError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class ReaderGoneError(Exception):
    """Who read the output (head, less) has what it wanted. No OSError, of which typer makes exit status 1."""


class _Output(io.FileIO):
    def write(self, data: ReadableBuffer, /) -> int:
        """ReaderGoneError, OutputError."""
        try:
            return super().write(data)
        except BrokenPipeError as e:
            raise ReaderGoneError from e
        except OSError as e:
            raise OutputError(
                f"the output could not be written: {e.strerror}.", "hvctl operation list shows what was changed"
            ) from e


def own_output() -> None:
    """Have print() and everything else write by way of it; characters that a terminal cannot show end no command."""
    if sys.stdout is None:  # closed by the caller
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        raw = _Output(sys.stdout.fileno(), "w", closefd=False)
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(raw), sys.stdout.encoding, "backslashreplace", line_buffering=sys.stdout.isatty()
        )


def drop_output() -> None:
    """What is still to be written goes nowhere: no second attempt at the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
