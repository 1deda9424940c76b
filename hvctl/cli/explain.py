"""hvctl explain"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hvctl import codec
from hvctl.cli import render
from hvctl.cli.context import Format, globals_of
from hvctl.cli.decision import described, lines
from hvctl.model.operation import Operation
from hvctl.units import format_seconds


def explain(
    context: typer.Context,
    ident: Annotated[str, typer.Argument(metavar="ID", help="An operation (12), or a decision of a guard (d12).")],
) -> None:
    """Say why something was done, or was not: the plan and its reasons, the inputs, the alternatives."""
    from hvctl.operations import why

    options = globals_of(context)
    found = why.explained(options.settings(), ident)
    data = {
        "operation": found.operation and codec.dump(found.operation),
        "decision": found.decision and described(found.decision),
    }
    shown = lines(found.decision) if found.decision else []
    shown += _operation(found.operation) if found.operation else []
    if options.format is Format.CSV:
        render.rows(options, "explanation", [data], (render.Column("operation", ""), render.Column("decision", "")))
    else:
        render.detail(options, "explanation", data, shown)


def _operation(operation: Operation) -> list[tuple[str, str]]:
    result = operation.result or {}
    found = [
        ("operation", f"{operation.id}: {result.get('goal', f'{operation.kind} {operation.vm_name}')}"),
        ("asked by", f"{operation.who} at {operation.opened_at}{_asked(operation, result)}"),
    ]
    found += [("because", reason) for reason in result.get("reasons", ())]
    found += [
        ("step", f"{s.name} {s.detail}".rstrip() + f": {s.outcome} in {format_seconds(s.seconds)}")
        for s in operation.steps
    ]
    found.append(("ended", f"{operation.state}" + (f": {operation.reason}" if operation.reason else "")))
    return [*found, *(("warning", warning) for warning in result.get("warnings", ()))]


def _asked(operation: Operation, result: dict[str, Any]) -> str:
    """What a person would have typed: parts by their names, and of a change what it names."""
    given = operation.request | operation.request.get("change", {})
    words = [f"{k} {v}" for k, v in given.items() if v is not None and not isinstance(v, dict | list)]
    words += [f"parts {', '.join(result['scope'])}"] if result.get("scope") else []
    return f": {', '.join(words)}" if words else ""
