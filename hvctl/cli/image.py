"""hvctl image build|list|delete"""

from __future__ import annotations

from typing import Annotated

import typer

from hvctl import codec
from hvctl.cli import render
from hvctl.cli.context import globals_of
from hvctl.cli.options import DryRun, ImageName
from hvctl.cli.render import Column
from hvctl.units import format_size

app = typer.Typer(help="Base images: build, list, delete.", no_args_is_help=True)

COLUMNS = (
    Column("name", "NAME"),
    Column("digest", "DIGEST", lambda v: str(v)[:12]),
    Column("bytes", "SIZE", format_size),
    Column("min_memory", "MIN MEMORY", format_size),
    Column("built_at", "BUILT"),
)


@app.command()
def build(
    context: typer.Context,
    image: ImageName,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build even if the recipe's result is there.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Build a base image from the host's own apt configuration; cached by its recipe's hash."""
    from hvctl.operations import image as verbs

    options = globals_of(context)
    built = verbs.build(options.settings(), image, options.say, rebuild=rebuild, dry_run=dry_run)
    render.rows(options, "images", [codec.dump(i) for i in built], COLUMNS)


@app.command("list")
def list_(context: typer.Context) -> None:
    """List the images there are."""
    from hvctl.adapters.images import imagestore

    options = globals_of(context)
    found = imagestore.list_images(options.settings())
    render.rows(options, "images", [codec.dump(i) for i in found], COLUMNS)


@app.command()
def delete(context: typer.Context, image: ImageName, dry_run: DryRun = False) -> None:
    """Delete an image; refused while a VM has an overlay of it."""
    from hvctl.operations import image as verbs

    options = globals_of(context)
    gone = verbs.delete(options.settings(), image, dry_run=dry_run)
    options.say(f"image {image}: {'would delete' if dry_run else 'deleted'} {gone}")
