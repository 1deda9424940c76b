"""hvctl doctor, hvctl host prepare, hvctl config show"""

from __future__ import annotations

import os
import re
from dataclasses import fields
from typing import Annotated, Any

import typer

from hvctl import codec
from hvctl.cli import render
from hvctl.cli.context import Format, Globals, globals_of
from hvctl.cli.options import ExitCodeUnlessYes
from hvctl.cli.render import Column
from hvctl.errors import Exit
from hvctl.settings import config_files

app = typer.Typer(help="The hypervisor host: prepare it for hvctl.", no_args_is_help=True)
config = typer.Typer(help="Settings and where they come from.", no_args_is_help=True)

FINDINGS = (
    Column("name", "PROBE"),
    Column("status", "STATUS"),
    Column("detail", "SEEN"),
    Column("lost", "LOST"),
    Column("remedy", "REMEDY"),
)
CHANGES = (Column("name", "WHAT"), Column("now", "NOW"), Column("wanted", "WANTED"), Column("how", "HOW"))


def doctor(
    context: typer.Context,
    fix: Annotated[bool, typer.Option("--fix", help="Mend drift, stale snapshots and dead owners' leftovers.")] = False,
    probe: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this probe; may be repeated; drift is one.")
    ] = None,
) -> None:
    """Probe the host by doing, and compare what was promised with what is. Exit 1 if something is failing."""
    from hvctl.adapters.probes import examine
    from hvctl.model.finding import Finding, Health

    options = globals_of(context)
    names = [n for n in probe or () if n != "drift"]
    found: list[Finding] = []
    if os.geteuid():
        options.say("not run as root: what is denied below may be denied for that alone")
    if names or not probe:
        found += examine(options.settings(), names)
    if not probe or "drift" in probe:
        found += _drift(options, fix)
    render.rows(options, "findings", [codec.dump(f) for f in found], FINDINGS)
    if any(f.status is Health.FAILING for f in found):
        raise typer.Exit(Exit.FAILED)


def _drift(options: Globals, fix: bool) -> list[Any]:
    from hvctl.errors import HvctlError
    from hvctl.model.finding import failing
    from hvctl.operations import doctor as verbs

    try:
        with options.engine() as engine:
            seen = verbs.look(engine)
            if fix and seen:
                verbs.fix(engine, seen, options.say)
                seen = verbs.look(engine)
            return list(verbs.as_findings(seen))
    except HvctlError as e:
        return [failing("drift", e.message, "nobody can say whether promises hold", e.hint or "hvctl doctor")]


@app.command()
def prepare(
    context: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", help="Make the changes; without, they are only shown.")] = False,
    exit_code: ExitCodeUnlessYes = False,
) -> None:
    """Show, and with --yes make, what this host needs: folders, libvirt's memory_backing_dir, services.

    A second run changes nothing.
    """
    from hvctl.adapters.node import hostprep

    options = globals_of(context)
    settings = options.settings()
    changes = hostprep.changes(settings)
    if yes:
        for change in changes:
            options.say(f"{change.name}: {change.how}")
            hostprep.apply(change)
    data = [{"name": c.name, "now": c.now, "wanted": c.wanted, "how": c.how, "applied": yes} for c in changes]
    if data or options.format is not Format.TABLE:
        render.rows(options, "changes", data, CHANGES)
    else:
        options.say("the host is prepared: nothing to change")
    if exit_code and changes and not yes:
        raise typer.Exit(Exit.CHANGES_PENDING)


@config.command()
def show(context: typer.Context) -> None:
    """Show every setting in force and where its value came from."""
    options = globals_of(context)
    settings = options.settings()
    for path in config_files(os.environ):
        if os.access(path, os.F_OK) and not os.access(path, os.R_OK):
            options.say(f"{path} cannot be read by this user: what it sets is not in force here")
    data = [
        {
            "name": f.name,
            "value": _shown(f.name, getattr(settings, f.name)),
            "from": settings.origins.get(f.name, "default"),
        }
        for f in fields(settings)
        if f.name != "origins"
    ]
    render.rows(
        options, "settings", data, (Column("name", "SETTING"), Column("value", "VALUE"), Column("from", "FROM"))
    )


def _shown(name: str, value: Any) -> Any:
    """The value, without the password that a database URL may carry."""
    if name != "database_url" or not value or str(value).startswith("sqlite:///"):
        return value
    # What is not surely the host and the name is not shown: a password may hold any character, or stand in the query.
    clear = re.fullmatch(r"([a-z0-9+]+)://(?:[^/?#@]*@)?([^/?#@]*/[^/?#@]*)(?:\?[^/#@]*)?", str(value))
    return f"{clear[1]}://…@{clear[2]}" if clear else "…"
