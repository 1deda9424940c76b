"""A group whose commands are imported when they are named: building all of them takes longer than most commands do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, ClassVar

import typer
from typer.core import TyperGroup


class Commands(Mapping[str, Any]):
    """Commands by name, each made when it is asked for. places: "module.attribute" of this package, where a
    typer.Typer stands for a group and a function for a command."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            module, _, attribute = self._places[name].partition(".")
            self._made[name] = _made(name, getattr(import_module(f"hvctl.cli.{module}"), attribute))
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _made(name: str, found: Any) -> Any:
    """typer makes commands of a whole tree; of a tree with this one alone it is taken."""
    tree = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    if isinstance(found, typer.Typer):
        tree.add_typer(found, name=name)
    else:
        tree.command(name)(found)
    return typer.main.get_group(tree).commands[name]


class LazyGroup(TyperGroup):
    """Its subclass says where the commands are."""

    places: ClassVar[Mapping[str, str]]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.commands = Commands(self.places)  # type: ignore[assignment]

    def list_commands(self, _ctx: Any) -> list[str]:
        return list(self.commands)
