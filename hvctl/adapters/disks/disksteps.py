"""How the steps of a disk's reset reach QEMU: many in one exchange, or one by one with each told of before it is done.

Every step has a name, which is what a test that kills at each of them goes by.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvctl.adapters.disks import diskseat
from hvctl.adapters.disks.diskseat import Sight
from hvctl.adapters.qemu.qmp import Qmp, Query
from hvctl.errors import HvctlError

Step = tuple[str, Query, Mapping[str, object]]
At = Callable[[str], None]


class Steps:
    """Of one reset; stages are milliseconds by name, in order."""

    def __init__(self, qmp: Qmp, at: At | None = None) -> None:
        self.qmp = qmp
        self.stages: list[tuple[str, float]] = []
        self._at = at
        self._last = time.perf_counter()

    def send(self, steps: Sequence[Step]) -> list[Any]:
        """All at once, since every exchange with QEMU costs a millisecond; one by one where somebody listens."""
        if self._at is None:
            return self.qmp.execute_all([step[1:] for step in steps]) if steps else []
        answers = []
        for name, command, arguments in steps:
            self.tell(name)
            answers.append(self.qmp.execute(command, arguments))
        return answers

    def tell(self, step: str) -> None:
        if self._at is not None:
            self._at(step)

    def look(self, steps: Sequence[Step] = ()) -> Sight:
        """What there is after these steps."""
        if steps and self._at is None:
            commands = [*(step[1:] for step in steps), *diskseat.QUESTIONS]
            return diskseat.sight(self.qmp.execute_all(commands)[len(steps) :])
        self.send(steps)
        return diskseat.sight(self.qmp.execute_all(diskseat.QUESTIONS))

    def lap(self, name: str) -> float:
        """A stage ends here; milliseconds since the one before."""
        now = time.perf_counter()
        took, self._last = (now - self._last) * 1e3, now
        self.stages.append((name, took))
        return took


def words(cause: HvctlError | OSError) -> str:
    """For the middle of a sentence."""
    if isinstance(cause, HvctlError):
        return cause.message.rstrip(".")
    return f"{cause.filename}: {cause.strerror}"
