"""hvctl interrupt, hvctl resume"""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from hvctl import codec
from hvctl.cli import render
from hvctl.cli.complete import vm_names
from hvctl.cli.context import Format, Globals, globals_of
from hvctl.cli.options import DryRun, bounded
from hvctl.cli.pool import in_words, need
from hvctl.cli.render import Column
from hvctl.errors import UsageError
from hvctl.model.pool import Rung
from hvctl.units import format_duration, format_time, parse_duration, parse_moment

Vms = Annotated[list[str] | None, typer.Argument(metavar="VM...", help="VMs by name or UUID.", autocompletion=vm_names)]
LADDER = tuple(Rung)


def interrupt(
    context: typer.Context,
    vms: Vms = None,
    wanted: Annotated[
        str | None, typer.Option("--need", metavar="NEED", help="cpu=2,memory=4GiB[,network=100Mbit][,iops=500]")
    ] = None,
    owner: Annotated[
        str | None, typer.Option(metavar="OWNER", help="Who gets it: a VM, there or to come, or any text.")
    ] = None,
    lasts: Annotated[
        str, typer.Option("--for", metavar="DURATION", help="How long it is kept for the owner; or none.")
    ] = "1h",
    back: Annotated[str, typer.Option("--return", metavar="DURATION", help="When victims come back.")] = "1h",
    by: Annotated[
        str | None, typer.Option(metavar="TIME", help="Not later than this (+30min, or a time), whatever is given up.")
    ] = None,
    how: Annotated[
        Rung, typer.Option(help="The hardest that may be done: VMs that are named get just this.")
    ] = Rung.SAVE,
    gentlest: Annotated[Rung, typer.Option(help="What is tried first.")] = Rung.SQUEEZE,
    grace: Annotated[float, typer.Option(metavar="N", callback=bounded, help="Seconds a guest has.")] = 30.0,
    within: Annotated[str | None, typer.Option(metavar="DURATION", help="How much time there is for it.")] = None,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="What guests are told.")] = "asked for by its operator",
    due: Annotated[bool, typer.Option("--due", help="Begin the demands that were delayed until now.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Take resources back from interruptible VMs: those that are named, or the cheapest that free what is needed.

    What is freed is reserved for the owner, and the victims come back later (hvctl resume).
    """
    if (bool(vms) + bool(wanted) + due) != 1:
        raise UsageError("name VMs, or what is needed, or --due.", "hvctl interrupt --need cpu=2,memory=4GiB")
    from hvctl.decide.interrupt import Ask
    from hvctl.operations import interrupt as verbs

    options = globals_of(context)
    gap = parse_duration(back)
    with options.engine() as engine:
        if vms:
            outcomes = verbs.vms(
                engine, vms, how, back=gap, grace=grace, reason=reason, dry_run=dry_run, key=options.key
            )
            _outcomes(options, outcomes)
            return
        if due:
            _due(options, verbs.due(engine, dry_run=dry_run))
            return
        ask = Ask(
            need(wanted or ""),
            owner or engine.who,
            None if lasts == "none" else parse_duration(lasts),
            gap,
            None if by is None else parse_moment(by, time.time()),
            LADDER[LADDER.index(gentlest) : LADDER.index(how) + 1],
            grace,
            None if within is None else parse_duration(within),
        )
        if not ask.rungs:
            raise UsageError(f"{gentlest} is harder than {how}.", "--gentlest stands before --how on the ladder")
        if not ask.need.any:
            raise UsageError("nothing is needed.", "hvctl interrupt --need cpu=2,memory=4GiB")
        _report(options, verbs.for_need(engine, ask, dry_run=dry_run, key=options.key))


def resume(
    context: typer.Context,
    vms: Vms = None,
    due: Annotated[bool, typer.Option("--due", help="Everybody whose time has come.")] = False,
    returned: Annotated[
        bool, typer.Option("--returned", help="List what those that are back needed, beside what was predicted.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Let VMs that were interrupted come back, with what was worked out for them; without a VM, list those away."""
    if bool(vms) + due + returned > 1:
        raise UsageError("name VMs, or --due, or --returned.", "hvctl resume --due")
    from hvctl.operations import comeback as verbs
    from hvctl.operations import restarts

    options = globals_of(context)
    with options.engine() as engine:
        if returned:
            render.rows(options, "returned", restarts.returns(engine), RETURNED)
            return
        if not vms and not due:
            render.rows(options, "away", [codec.dump(a) for a in verbs.away(engine)], AWAY)
            return
        result = (
            verbs.due(engine, dry_run=dry_run)
            if due
            else verbs.resume(engine, vms or (), dry_run=dry_run, key=options.key)
        )
    _outcomes(options, list(result.outcomes), [{"vm": a.vm_name, "why": why} for a, why in result.left])
    for warning in result.warnings:
        options.say(f"warning: {warning}")


DESCRIBED = (
    "scheduled", "at", "reasons", "shrinks", "victims", "given_up", "rejected", "demand", "operations", "warnings",
)  # fmt: skip
AWAY = (
    Column("vm_name", "VM"),
    Column("rung", "HOW"),
    Column("out_at", "SINCE", lambda v: format_time(v)),
    Column("return_at", "RETURNS", lambda v: format_time(v)),
    Column("demand", "DEMAND"),
    Column("forecast", "FORECAST"),
    Column("reason", "REASON"),
)


RETURNED = (
    Column("vm", "VM"),
    Column("how", "HOW"),
    Column("returned_at", "RETURNED", lambda v: format_time(v)),
    Column("span", "FIRST", lambda v: format_duration(v)),
    Column("resource", "RESOURCE"),
    Column("predicted", "PREDICTED", lambda v: f"{v:.2f}"),
    Column("needed", "NEEDED", lambda v: f"{v:.2f}"),
    Column("unit", "UNIT"),
    Column("ratio", "RATIO", lambda v: "-" if v is None else f"{v:.2f}"),
)


def _outcomes(options: Globals, outcomes: list[Any], left: list[dict[str, str]] | None = None) -> None:
    if options.format is not Format.TABLE:
        data = {"operations": [codec.dump(o) for o in outcomes], "left": left or []}
        render.detail(options, "interruption", data, ())
        return
    for outcome in outcomes:
        render.outcome(options, outcome)
    for one in left or ():
        options.say(f"{one['vm']} stays away: {one['why']}")


def _report(options: Globals, report: Any) -> None:
    """The plan and, when it was carried out, how each part of it went."""
    data = _described(report)
    if options.format is not Format.TABLE:
        render.detail(options, "interruption", data, ())
        return
    lines = [("reason", r) for r in data["reasons"]]
    if data["scheduled"]:
        lines.append(("delayed until", format_time(data["at"])))
    lines += [("shrink", f"{s['vm']}: gives {in_words(s['gives'])}") for s in data["shrinks"]]
    lines += [
        ("interrupt", f"{v['vm']}: {v['how']}, gives {in_words(v['gives'])}; cost {v['cost']:.1f}: {v['why']}")
        for v in data["victims"]
    ]
    lines += [("given up", text) for text in data["given_up"]]
    lines += [("not", f"{name}: {why}") for name, why in data["rejected"]]
    if data["demand"]:
        demand = data["demand"]
        lines.append(
            ("reservation", f"{demand['id']} of {demand['owner']}: {demand['state']}, {in_words(demand['granted'])}")
        )
    render.detail(options, "interruption", data, lines)
    for outcome in report.outcomes:
        render.outcome(options, outcome)
    for warning in report.warnings:
        options.say(f"warning: {warning}")


def _due(options: Globals, reports: list[Any]) -> None:
    """Every demand that was begun in one document."""
    if options.format is not Format.TABLE:
        render.rows(options, "interruptions", [_described(r) for r in reports], [Column(k, k) for k in DESCRIBED])
    for report in reports if options.format is Format.TABLE else ():
        _report(options, report)


def _described(report: Any) -> dict[str, Any]:
    plan = report.plan
    return {
        "scheduled": report.scheduled,
        "at": plan and plan.at,
        "reasons": list(plan.reasons) if plan else [],
        "shrinks": [
            {"vm": s.seen.vm.name, "gives": codec.dump(s.gives), "to": codec.dump(s.to)} for s in plan.shrinks
        ] if plan else [],
        "victims": [
            {"vm": t.seen.vm.name, "how": t.rung.value, "gives": codec.dump(t.gives), "cost": t.cost, "why": t.why,
             "returns_with": codec.dump(t.goal)} for t in plan.turns
        ] if plan else [],
        "given_up": list(plan.given_up) if plan else [],
        "rejected": [list(r) for r in plan.rejected] if plan else [],
        "demand": report.demand and codec.dump(report.demand),
        "operations": [codec.dump(o) for o in report.outcomes],
        "warnings": list(report.warnings),
    }  # fmt: skip
