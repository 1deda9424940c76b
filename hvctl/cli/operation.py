"""hvctl operation list|show, hvctl recover"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from hvctl import codec
from hvctl.cli import render
from hvctl.cli.complete import vm_names
from hvctl.cli.context import globals_of
from hvctl.cli.render import Column
from hvctl.model.operation import OpState
from hvctl.units import format_seconds

app = typer.Typer(help="The journal: every change, its steps, times and reasons.", no_args_is_help=True)

COLUMNS = (
    Column("id", "ID"),
    Column("kind", "KIND"),
    Column("vm_name", "VM"),
    Column("state", "STATE"),
    Column("who", "WHO"),
    Column("opened_at", "OPENED"),
    Column("closed_at", "CLOSED"),
    Column("reason", "REASON"),
)


@app.command("list")
def list_(
    context: typer.Context,
    vm: Annotated[str | None, typer.Option(metavar="VM", help="Only of this VM.", autocompletion=vm_names)] = None,
    state: Annotated[OpState | None, typer.Option(help="Only in this state.")] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=1_000_000, help="How many, newest first.")] = 50,
) -> None:
    """List operations, newest first."""
    from hvctl.operations import journal

    options = globals_of(context)
    data = [codec.dump(o) for o in journal.operations(options.settings(), vm, state, limit)]
    render.rows(options, "operations", data, COLUMNS)


@app.command()
def show(context: typer.Context, number: Annotated[int, typer.Argument(metavar="ID", min=0, max=2**63 - 1)]) -> None:
    """Show one operation: request, steps with their times, result and reason."""
    from hvctl.operations import journal

    options = globals_of(context)
    data = codec.dump(journal.operation(options.settings(), number))
    lines = [(c.heading.lower(), c.text(data[c.key])) for c in COLUMNS]
    lines.append(("request", json.dumps(data["request"], ensure_ascii=False)))
    for i, step in enumerate(data["steps"], start=1):
        facts = render.in_words(step["facts"])
        text = f"{step['name']} {step['detail']}: {step['outcome']} in {format_seconds(step['seconds'])} {facts}"
        lines.append((f"step {i}", text.rstrip()))
    render.detail(options, "operation", data, lines)


def recover(context: typer.Context) -> None:
    """End every operation whose owner died: finish it, undo it, or say why it is quarantined."""
    from hvctl.errors import NotUndoneError
    from hvctl.operations import journal

    options = globals_of(context)
    with options.engine() as engine:
        ended, still_open = journal.recover(engine)
    render.rows(options, "operations", [codec.dump(o) for o in ended], COLUMNS)
    if still_open:
        numbers = ", ".join(str(o.id) for o in still_open)
        raise NotUndoneError(f"still open: {numbers}.", "hvctl -v recover says why")
