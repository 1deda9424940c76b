"""How often what was said has been enough, lately: the observed coverage that stands beside the stated one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

REMEMBERED: Final = 1000.0  # cases after which an old one weighs 1/e


@dataclass(frozen=True, slots=True)
class Coverage:
    """Of `cases` in all; covered of recent are decayed sums."""

    cases: int = 0
    recent: float = 0.0
    covered: float = 0.0

    @property
    def share(self) -> float | None:
        """None before there was any."""
        return self.covered / self.recent if self.recent > 0 else None

    def after(self, covered: int, cases: int) -> Coverage:
        """With the outcomes of `cases` more."""
        kept = math.exp(-cases / REMEMBERED)
        return Coverage(self.cases + cases, self.recent * kept + cases, self.covered * kept + covered)
