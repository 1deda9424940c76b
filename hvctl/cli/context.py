"""What the flags before the command mean for every command, and how a command opens the engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import typer

from hvctl.cli.printable import printable
from hvctl.errors import Interrupted
from hvctl.settings import Settings, load_settings

if TYPE_CHECKING:
    from hvctl.engine.operate import Engine


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"
    YAML = "yaml"
    CSV = "csv"


@dataclass
class Globals:
    """The root flags of one command line."""

    connect: str | None = None
    format: Format = Format.TABLE
    quiet: bool = False
    verbose: bool = False
    key: str | None = None

    def settings(self) -> Settings:
        return load_settings({"uri": self.connect})

    def say(self, text: str) -> None:
        """A remark for the person at the terminal; never data."""
        if not self.quiet:
            print(printable(text), file=sys.stderr)

    def progress(self, text: str) -> None:
        if self.verbose:
            self.say(text)

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        from hvctl.engine.runtime import open_engine

        with open_engine(self.settings(), self.progress) as engine:
            try:
                yield engine
            except Interrupted as e:
                from hvctl.cli.render import complain

                complain(e.told)
                raise


def globals_of(context: typer.Context) -> Globals:
    found = context.find_root().obj
    assert isinstance(found, Globals)
    return found
