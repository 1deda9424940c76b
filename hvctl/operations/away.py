"""What the daemon does by itself for VMs that are away and for whom they make room, by the operations that an operator
calls: `hvctl pool show`, `hvctl interrupt --due`, `hvctl resume --due`."""

from __future__ import annotations

from hvctl.engine.operate import Engine
from hvctl.operations import comeback, interrupt, pool


def account(engine: Engine) -> str:
    """Look at every reservation, where there are any; in words how many."""
    held = engine.store.pool.reservations(engine.facts.name)
    if held:
        pool.follow(engine)
    return f"{len(held)} reservations"


def demands(engine: Engine) -> str:
    begun = interrupt.due(engine)
    return f"{len(begun)} demands begun"


def returns(engine: Engine) -> str:
    if not comeback.away(engine):
        return "nobody is away"
    done = comeback.due(engine)
    return f"{len(done.outcomes)} back, {len(done.left)} stay away"
