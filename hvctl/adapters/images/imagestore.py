"""The built guest images under the images folder: `NAME-DIGEST/` with kernel, initrd, root.qcow2 and image.json.

A folder exists under such a name only when it is complete; everything that begins with a dot is being made or removed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hvctl import codec
from hvctl.adapters.qemu import qemuimg
from hvctl.errors import HvctlError, InUseError, NotFoundError, RefusedError
from hvctl.model.image import Image
from hvctl.settings import Settings

MANIFEST = "image.json"
# In the folder of a VM: the folder of the image that it boots from.
IMAGE_LINK = "image"


def image_folder(settings: Settings, name: str, digest: str) -> Path:
    return settings.images_dir / f"{name}-{digest[:12]}"


def list_images(settings: Settings) -> tuple[Image, ...]:
    """Every complete image by name, the newest of each name first; what cannot be read is left out."""
    images = [image for _, image in _scan(settings)]
    return tuple(sorted(sorted(images, key=lambda i: i.built_at, reverse=True), key=lambda i: i.name))


def find(settings: Settings, name: str) -> Image:
    """The newest image of that name."""
    for image in list_images(settings):
        if image.name == name:
            return image
    from hvctl.adapters.images.imagebuild import recipe_names

    known = recipe_names()
    hint = f"build it: hvctl image build {name}" if name in known else f"hvctl image build knows {', '.join(known)}"
    raise NotFoundError(f"there is no image {name!r}.", hint)


def load(folder: Path) -> Image | None:
    """The image in a folder, None if it is not there, not readable or not complete."""
    try:
        image = codec.load_json(Image, (folder / MANIFEST).read_bytes())
    except (OSError, HvctlError):
        return None
    files = (image.kernel, image.initrd, *((image.root,) if image.root else ()))
    return image if all(Path(f).parent == folder and Path(f).is_file() for f in files) else None


def publish(image: Image, partial: Path, folder: Path) -> None:
    """Write the manifest into the complete `partial` and give it its name; an older folder there is replaced."""
    (partial / MANIFEST).write_text(json.dumps(codec.dump(image), indent=2) + "\n")
    for file in partial.iterdir():
        file.chmod(0o444)
        with file.open("rb") as written:
            os.fsync(written.fileno())
    partial.chmod(0o755)
    if folder.exists():
        _remove(folder)
    partial.rename(folder)


def delete(settings: Settings, name: str) -> tuple[Image, ...]:
    """Remove every image of that name; what was removed. Nothing is, if a VM needs one of them: RefusedError."""
    found = [(folder, image) for folder, image in _scan(settings) if image.name == name]
    if not found:
        raise NotFoundError(f"there is no image {name!r}.", "see what there is: hvctl image list")
    for _, image in found:
        refuse_in_use(settings, image)
    for folder, _ in found:
        _remove(folder)
    return tuple(image for _, image in found)


def refuse_in_use(settings: Settings, image: Image) -> None:
    """A VM's folder tells what it needs: the link to the image that it boots from, and its overlays."""
    folder = Path(image.kernel).parent
    for link in sorted(settings.vms_dir.glob(f"*/{IMAGE_LINK}")):
        if link.is_symlink() and link.readlink() == folder:
            raise InUseError(link.parent.name, f"boots from the image {image.name}")
    for overlay in sorted(settings.vms_dir.glob("*/*.qcow2")):
        try:
            backing = qemuimg.backing_file(overlay)
        except RefusedError as e:
            raise RefusedError(f"it is not known which image {overlay} needs: {e.message}", e.hint) from e
        if backing is not None and backing.is_relative_to(folder):
            raise InUseError(overlay.parent.name, f"has a disk over the image {image.name}")


def _scan(settings: Settings) -> Iterator[tuple[Path, Image]]:
    for manifest in sorted(settings.images_dir.glob(f"[!.]*/{MANIFEST}")):
        if image := load(manifest.parent):
            yield manifest.parent, image


def _remove(folder: Path) -> None:
    """Renamed first, so that a removal that is cut short leaves nothing that looks like an image."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)
