"""An adapter that is made at its first use."""

from __future__ import annotations

from hvctl.engine.late import late


class Adapter:
    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.closed = False

    def ask(self) -> int:
        return type(self).made

    def close(self) -> None:
        self.closed = True


def test_it_is_made_once_and_only_if_something_is_asked() -> None:
    Adapter.made = 0
    port = late(Adapter)
    port.close()
    assert Adapter.made == 0
    assert (port.ask(), port.ask()) == (1, 1)
    port.close()
    assert port.closed
