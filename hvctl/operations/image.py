"""Images: build from a recipe, delete. They belong to no VM, so they need no journal; the folder is the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hvctl.adapters.images import imagebuild, imagestore
from hvctl.errors import HvctlError, InUseError, RefusedError
from hvctl.model.image import Image
from hvctl.operations.inspect import vms
from hvctl.settings import Settings


def build(
    settings: Settings, name: str, progress: Callable[[str], None], *, rebuild: bool, dry_run: bool
) -> list[Image]:
    """The built image; with dry_run the one that would be used as it is, or none if it would be built."""
    if dry_run:
        cached = imagebuild.cached(settings, name)
        progress(f"image {name}: {'is there' if cached and not rebuild else 'would be built'}")
        return [cached] if cached else []
    with _by_name(settings):
        return [imagebuild.build(settings, name, progress, force=rebuild)]


def delete(settings: Settings, name: str, *, dry_run: bool) -> str:
    """The digest of the deleted image; RefusedError while a VM has an overlay of it."""
    image = imagestore.find(settings, name)
    with _by_name(settings):
        imagestore.refuse_in_use(settings, image)
        if not dry_run:
            imagestore.delete(settings, name)
    return image.digest[:12]


@contextmanager
def _by_name(settings: Settings) -> Iterator[None]:
    """Who needs an image is told by its name, as far as the host can be asked for it."""
    try:
        yield
    except InUseError as e:
        try:
            names = {vm["uuid"]: vm["name"] for vm in vms(settings)}
        except HvctlError:
            raise e from None
        if e.vm not in names:
            raise RefusedError(
                f"a VM that is not there any more left a folder that needs it: {e.vm}.", "hvctl doctor --probe drift"
            ) from e
        raise InUseError(names[e.vm], e.how) from e
