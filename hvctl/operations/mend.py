"""What the daemon mends by itself, by the operations that an operator calls: `hvctl doctor --fix`, `hvctl recover`."""

from __future__ import annotations

from collections.abc import Sequence

from hvctl.decide.drift import Drift, Mend
from hvctl.engine.operate import Engine
from hvctl.errors import NotUndoneError
from hvctl.operations import doctor, journal


def recover(engine: Engine) -> str:
    """End what dead owners left; what was done. What is still open is owned by somebody, or is tried again."""
    ended, still_open = journal.recover(engine)
    return f"{len(ended)} operations ended, {len(still_open)} open"


def reconcile(engine: Engine) -> str:
    """Mend the drift that can be mended; NotUndoneError if some of that is left. What is for a person is named each
    time, and is no failure: no later run of this could do better."""
    found = left = doctor.look(engine)
    mendable = _mendable(found)
    if mendable:
        doctor.fix(engine, found, engine.progress)
        left = doctor.look(engine)
    if still := _mendable(left):
        raise NotUndoneError(
            f"{len(still)} of {len(found)} drifts are left: {_names(still)}.", "hvctl doctor --probe drift"
        )
    said = [f"{len(mendable)} drifts mended"] if mendable else []
    said += [f"{len(left)} for a person to look at (hvctl doctor --probe drift): {_names(left)}"] if left else []
    return "; ".join(said) or "what was promised is in force"


def _mendable(drifts: Sequence[Drift]) -> list[Drift]:
    return [d for d in drifts if d.mend is not Mend.NOTHING]


def _names(drifts: Sequence[Drift]) -> str:
    return ", ".join(sorted({d.vm_name for d in drifts}))
