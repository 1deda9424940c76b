"""Options that several commands share, declared once."""

from __future__ import annotations

from typing import Annotated

import typer

from hvctl.cli.complete import image_names, snapshot_names, vm_names
from hvctl.errors import Exit, UsageError
from hvctl.model.operation import Outcome

LONGEST = 86400.0

VmName = Annotated[str, typer.Argument(metavar="VM", help="A VM by name or UUID.", autocompletion=vm_names)]
SnapshotName = Annotated[
    str, typer.Argument(metavar="NAME", help="A snapshot by name or id.", autocompletion=snapshot_names)
]
ImageName = Annotated[str, typer.Argument(metavar="IMAGE", help="micro or debian.", autocompletion=image_names)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")]
ExitCode = Annotated[bool, typer.Option("--exit-code", help="With --dry-run: exit 10 if something would change.")]

ExitCodeUnlessYes = Annotated[
    bool, typer.Option("--exit-code", help="Without --yes: exit 10 if something would change.")
]


def bounded(seconds: float) -> float:
    """The callback of options in seconds: neither infinite nor `nan`, which no comparison finds."""
    if not 0.1 <= seconds <= LONGEST:
        raise UsageError(f"{seconds:g} s is not a time to wait.", f"write 0.1 to {LONGEST:g}")
    return seconds


def pending(result: Outcome, exit_code: bool) -> None:
    """--dry-run --exit-code: the status tells whether there is something to do."""
    if exit_code and result.state is None and result.plan:
        raise typer.Exit(Exit.CHANGES_PENDING)
