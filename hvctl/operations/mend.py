"""What the daemon mends by itself, by the operations that an operator calls: `hvctl doctor --fix`, `hvctl recover`."""

from __future__ import annotations

from hvctl.engine.operate import Engine
from hvctl.errors import NotUndoneError
from hvctl.operations import doctor, journal


def recover(engine: Engine) -> str:
    """End what dead owners left; what was done. What is still open is owned by somebody, or is tried again."""
    ended, still_open = journal.recover(engine)
    return f"{len(ended)} operations ended, {len(still_open)} open"


def reconcile(engine: Engine) -> str:
    """Mend the drift that can be mended; NotUndoneError if some is left that a person has to look at."""
    found = doctor.look(engine)
    if not found:
        return "what was promised is in force"
    doctor.fix(engine, found, engine.progress)
    left = doctor.look(engine)
    if left:
        names = ", ".join(sorted({d.vm_name for d in left}))
        raise NotUndoneError(f"{len(left)} of {len(found)} drifts are left: {names}.", "hvctl doctor --probe drift")
    return f"{len(found)} drifts mended"
