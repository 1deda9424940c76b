"""Sets of models: the shipped one, and those in the state directory. Which one is in use is one small file, replaced
as a whole, that remembers what was in use before."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Final

from hvctl import codec
from hvctl.adapters.atomicfile import replace_file
from hvctl.adapters.models.boosters import Boosters, digest, load
from hvctl.errors import HvctlError, NotFoundError, RefusedError
from hvctl.model.forecast import ModelCard
from hvctl.settings import Settings

SHIPPED: Final = "shipped"
_CARD: Final = "card.json"
_CURRENT: Final = "current.json"
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def shipped_folder() -> Path:
    packaged = resources.files("hvctl") / "_models"
    return Path(str(packaged)) if packaged.is_dir() else Path(__file__).parents[3] / "models"


class ModelStore:
    """The sets under a state directory; a folder whose card cannot be read is an error where it is asked for, and
    left out of the list."""

    def __init__(self, settings: Settings) -> None:
        self._folder = Path(settings.state_dir) / "models"

    def cards(self) -> tuple[ModelCard, ...]:
        """The shipped one first, then by the time of their making."""
        found = [self.card(SHIPPED)] if (shipped_folder() / _CARD).is_file() else []
        own = []
        for path in self._folder.glob(f"*/{_CARD}") if self._folder.is_dir() else ():
            try:
                own.append(self.card(path.parent.name))
            except HvctlError:
                continue
        return (*found, *sorted(own, key=lambda c: (c.created_at, c.id)))

    def card(self, name: str) -> ModelCard:
        """NotFoundError; RefusedError for a card that cannot be read, or that is another's."""
        path = self.folder(name) / _CARD
        try:
            card = codec.load_json(ModelCard, path.read_bytes())
        except FileNotFoundError as e:
            raise NotFoundError(f"there is no model {name!r}.", "hvctl model list") from e
        except (OSError, HvctlError) as e:
            raise RefusedError(f"the card {path} cannot be read.", "hvctl model list") from e
        if name != SHIPPED and card.id != name:
            raise RefusedError(f"the card {path} is of the model {card.id!r}.", "hvctl model list")
        return card

    def folder(self, name: str) -> Path:
        if name == SHIPPED:
            return shipped_folder()
        if not _ID.fullmatch(name):
            raise NotFoundError(f"{name!r} is no name of a model.", "hvctl model list")
        return self._folder / name

    def current(self) -> str:
        """The name of the set in use; the shipped one if none was ever promoted, or nobody can tell."""
        return self._order()[-1]

    def open(self, name: str | None = None) -> Boosters:
        """The models of a set (the current one), each read when it is asked; NotFoundError, RefusedError as
        boosters.load."""
        chosen = self.current() if name is None else name
        return load(self.card(chosen), self.folder(chosen))

    def add(self, card: ModelCard, texts: Mapping[str, str]) -> ModelCard:
        """A new set, whole or not there; the card with the digests of its files. Nothing of it is in use yet."""
        if not _ID.fullmatch(card.id) or card.id == SHIPPED:
            raise RefusedError(f"{card.id!r} is no name for a model.", "use letters, digits, dots and dashes")
        self._folder.mkdir(parents=True, exist_ok=True)
        target = self._folder / card.id
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=self._folder))
        try:
            whole = write_set(made, card, texts)
            made.rename(target)
        except OSError as e:
            if target.exists():
                raise RefusedError(f"there is a model {card.id!r} already.", "hvctl model list") from e
            raise HvctlError(f"the model {card.id} cannot be written: {e.strerror}.", "hvctl doctor") from e
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return whole

    def promote(self, name: str) -> str:
        """Use a set from now on, after it was loaded once; the one before stays for rollback. The name before."""
        self.open(name).check()
        order = self._order()
        if order[-1] != name:
            self._write([*order, name][-10:])
        return order[-1]

    def rollback(self, *, dry_run: bool = False) -> str:
        """Use the one that was in use before; RefusedError if there is none. Its name."""
        order = self._order()
        if len(order) < 2:
            raise RefusedError("there is no model to go back to.", "hvctl model list")
        self.open(order[-2]).check()
        if not dry_run:
            self._write(order[:-1])
        return order[-2]

    def _order(self) -> list[str]:
        try:
            found = json.loads((self._folder / _CURRENT).read_text())
        except (OSError, ValueError):
            return [SHIPPED]
        names = [n for n in found if isinstance(n, str) and (n == SHIPPED or _ID.fullmatch(n))] if found else []
        return names or [SHIPPED]

    def _write(self, order: list[str]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        replace_file(self._folder / _CURRENT, json.dumps(order) + "\n")


def write_set(folder: Path, card: ModelCard, texts: Mapping[str, str]) -> ModelCard:
    """The files and their card in a folder that is there already."""
    whole = replace(card, files={key: digest(text.encode()) for key, text in sorted(texts.items())})
    for key, text in texts.items():
        replace_file(folder / f"{key}.txt", text, mode=0o644)
    replace_file(folder / _CARD, json.dumps(codec.dump(whole), indent=1) + "\n", mode=0o644)
    os.chmod(folder, 0o755)  # noqa: PTH101, S103 - readable as the packages are
    return whole
