"""An adapter that is made when it is first asked: most commands need one or two of a host's six, and the libraries
behind the others take longer to import than the command itself.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any, TypeVar, cast

Port = TypeVar("Port")

# What has nothing to do as long as there is no adapter.
_ENDS = frozenset({"close", "release"})


class _Late:
    def __init__(self, make: Callable[[], object]) -> None:
        self._make = make
        self._made: object | None = None
        self._lock = Lock()

    def __getattr__(self, name: str) -> Any:
        with self._lock:
            if self._made is None:
                if name in _ENDS:
                    return lambda: None
                self._made = self._make()
        return getattr(self._made, name)


def late(make: Callable[[], Port]) -> Port:
    """Stands for what `make` returns, and calls it once, at the first use."""
    return cast(Port, _Late(make))
