"""hvctl guard"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hvctl.cli import render
from hvctl.cli.complete import vm_names
from hvctl.cli.context import Globals, globals_of
from hvctl.cli.decision import amount, described, exhaustion, lines
from hvctl.cli.options import DryRun
from hvctl.cli.render import Column
from hvctl.errors import UsageError
from hvctl.units import format_time

STATUS = "status"
COLUMNS = (
    Column("vm", "VM"),
    Column("policy", "POLICY"),
    Column("next", "NEXT TO RUN OUT", lambda v: "-" if v is None else f"{v['resource']}: {v['text']}"),
    Column("last", "LAST DECISION", lambda v: "-" if v is None else f"d{v['decision']} {v['does']}: {v['reason']}"),
    Column("at", "AT", lambda v: "-" if v is None else format_time(v)),
)


def guard(
    context: typer.Context,
    vm: Annotated[
        str,
        typer.Argument(
            metavar="VM|status", help="A VM by name or UUID; `status` lists who is guarded.", autocompletion=vm_names
        ),
    ],
    policy: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Guard it by this policy from now on.")
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Guard it no more.")] = False,
    undo: Annotated[
        bool, typer.Option("--undo", help="Bring back what the guard reset last, while it is kept.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Have a VM looked after: before something runs out, one part of it grows or is reset, as its policy allows.

    With --policy and --dry-run: what would be decided now, and every alternative. The node daemon looks every few
    seconds; so does `hvctl job run guard`.
    """
    options = globals_of(context)
    if vm == STATUS:
        if policy or off or undo or dry_run:
            raise UsageError("`hvctl guard status` takes no options.", "a VM of that name is known by its UUID, too")
        _status(options)
        return
    if (policy is not None) + off + undo != 1:
        raise UsageError("say --policy, --off or --undo.", "hvctl guard status shows who is guarded, and how")
    from hvctl.operations import guard as verbs
    from hvctl.operations import guardact, guardpolicy

    watch = None if policy is None else guardpolicy.load(policy)
    with options.engine() as engine:
        if undo:
            render.outcome(options, guardact.undo(engine, vm, dry_run=dry_run, key=options.key))
            return
        if watch is not None and dry_run:
            decided = verbs.preview(engine, vm, watch)
            render.detail(options, "decision", described(decided), lines(decided))
            return
        render.outcome(options, verbs.arm(engine, vm, watch, dry_run=dry_run, key=options.key))


def _status(options: Globals) -> None:
    from hvctl.jobs.catalog import JOBS, pause_of
    from hvctl.operations import guard as verbs

    with options.engine() as engine:
        data = [_row(one) for one in verbs.guarded(engine)]
        paused = pause_of(JOBS["guard"], engine.store.jobs.pauses(engine.facts.name))
    if paused:
        options.say(f"paused by {paused.who}: hvctl job resume {paused.job or ''}".rstrip())
    render.rows(options, "guards", data, COLUMNS)


def _row(one: Any) -> dict[str, Any]:
    """next: the resource that is expected to run out first, or is most likely to."""
    row = {"vm": one.vm.name, "uuid": one.vm.uuid, "policy": one.watch.name, "next": None, "last": None, "at": None}
    if one.last is None:
        return row
    decision = one.last.decision
    pressed = sorted(decision.outlooks, key=lambda o: (-o.contention, -o.probability, o.resource))
    if pressed and pressed[0].probability >= 0.005:
        first = pressed[0]
        text = f"{amount(first.level, first.unit)} of {amount(first.limit, first.unit)}, {exhaustion(first)}"
        row["next"] = {
            "resource": first.resource, "level": first.level, "limit": first.limit, "unit": first.unit,
            "at": None if first.eta is None else one.last.until + first.eta, "probability": first.probability,
            "text": text,
        }  # fmt: skip
    row["at"] = one.last.until
    row["last"] = {
        "decision": one.last.id, "does": decision.chosen.name if decision.chosen else "nothing",
        "verdict": decision.verdict.value, "reason": decision.reason, "outcome": one.last.outcome,
        "operation": one.last.operation, "looks": one.last.looks,
    }  # fmt: skip
    return row
