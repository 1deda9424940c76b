"""Images: build from a recipe, delete. They belong to no VM, so they need no journal; the folder is the truth."""

from __future__ import annotations

from collections.abc import Callable

from hvctl.adapters.images import imagebuild, imagestore
from hvctl.model.image import Image
from hvctl.settings import Settings


def build(
    settings: Settings, name: str, progress: Callable[[str], None], *, rebuild: bool, dry_run: bool
) -> list[Image]:
    """The built image; with dry_run the one that would be used as it is, or none if it would be built."""
    if dry_run:
        cached = imagebuild.cached(settings, name)
        progress(f"image {name}: {'is there' if cached and not rebuild else 'would be built'}")
        return [cached] if cached else []
    return [imagebuild.build(settings, name, progress, force=rebuild)]


def delete(settings: Settings, name: str, *, dry_run: bool) -> str:
    """The digest of the deleted image; RefusedError while a VM has an overlay of it."""
    image = imagestore.find(settings, name)
    imagestore.refuse_in_use(settings, image)
    if not dry_run:
        imagestore.delete(settings, name)
    return image.digest[:12]
