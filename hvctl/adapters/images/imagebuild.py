"""Builds guest images from their recipes: reads the recipe, asks apt what it means today, makes what is not there.

The digest of an image covers its recipe, the guest's scripts, this code and the version of every package, so an image
that exists is the one that would be built. An image gets its name only when it is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.resources
import os
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hvctl.adapters.images import (
    imageelf,
    imageinitramfs,
    imagepackages,
    imagepulse,
    imagereseed,
    imageroot,
    imagestore,
)
from hvctl.adapters.images.imagepackages import Archive, Package
from hvctl.errors import BusyError, NotFoundError, RefusedError
from hvctl.model.image import DefaultDisk, Image
from hvctl.settings import Settings
from hvctl.units import parse_size

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """images/NAME/recipe.toml. root_packages is empty for a guest that lives in its initramfs."""

    name: str
    description: str
    cmdline: str
    min_memory: int
    epoch: int
    initramfs_packages: tuple[str, ...]
    programs: tuple[str, ...]
    modules: tuple[str, ...]
    root_packages: tuple[str, ...]
    root_size: int | None
    disks: tuple[DefaultDisk, ...]


def recipes_folder() -> Path:
    """In the wheel they are inside the package; in a checkout beside it."""
    package = Path(str(importlib.resources.files("hvctl")))
    inside = package / "_images"
    return inside if inside.is_dir() else package.parent / "images"


def recipe_names() -> tuple[str, ...]:
    return tuple(sorted(p.parent.name for p in recipes_folder().glob("*/recipe.toml")))


def load_recipe(name: str) -> Recipe:
    if name not in recipe_names():
        raise NotFoundError(f"there is no recipe for an image {name!r}.", f"recipes: {', '.join(recipe_names())}")

    def read(recipe: str) -> dict[str, Any]:
        return tomllib.loads((recipes_folder() / recipe / "recipe.toml").read_text())

    document = read(name)
    initramfs = (read(document["initramfs_of"]) if "initramfs_of" in document else document)["initramfs"]
    root = document.get("root")
    return Recipe(
        name=name,
        description=document["description"],
        cmdline=document["cmdline"],
        min_memory=parse_size(document["min_memory"]),
        epoch=document["source_date_epoch"],
        initramfs_packages=tuple(initramfs["packages"]),
        programs=tuple(initramfs["programs"]),
        modules=tuple(initramfs["modules"]),
        root_packages=tuple(root["packages"]) if root else (),
        root_size=parse_size(root["size"]) if root else None,
        disks=tuple(DefaultDisk(d["name"], parse_size(d["size"])) for d in document.get("disks", ())),
    )


def build(settings: Settings, name: str, progress: Progress, force: bool = False) -> Image:
    """The image of that name for today's packages, built unless it is there; `force` builds it again."""
    with _work_folder(settings.images_dir, name) as work:
        progress("asking apt for packages")
        inputs = _resolve(name, work)
        folder = imagestore.image_folder(settings, name, inputs.digest)
        existing = imagestore.load(folder)
        if existing and not force:
            return existing
        if existing:
            imagestore.refuse_in_use(settings, existing)
        return _make(inputs, work, folder, progress)


def cached(settings: Settings, name: str) -> Image | None:
    """The image that `build` would return without building; nothing is written beside a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="hvctl-") as work:
        return imagestore.load(imagestore.image_folder(settings, name, _resolve(name, Path(work)).digest))


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What an image is made of today: packages unpacked for the initramfs, packages installed on the root disk."""

    recipe: Recipe
    archive: Archive
    boot: tuple[Package, ...]
    root: tuple[Package, ...]

    @property
    def digest(self) -> str:
        return _digest(self.recipe, self.boot, self.root)


def _resolve(name: str, work: Path) -> _Inputs:
    recipe = load_recipe(name)
    if imagepackages.architecture() != "amd64":
        raise RefusedError("guest images are built for and on amd64 only.")
    archive = Archive(work / "apt")
    boot = archive.closure([*recipe.initramfs_packages, "linux-image-cloud-amd64"])
    # Only asked for the digest: mmdebstrap resolves the same packages for itself.
    base = ("?essential", "?priority(required)", "apt")
    root = archive.closure([*base, *recipe.root_packages]) if recipe.root_packages else ()
    return _Inputs(recipe, archive, _boot_packages(boot, recipe.initramfs_packages), root)


def _make(inputs: _Inputs, work: Path, folder: Path, progress: Progress) -> Image:
    recipe, archive, boot = inputs.recipe, inputs.archive, inputs.boot
    images = recipes_folder()
    partial = work / "image"
    partial.mkdir()
    progress(f"downloading {len(boot)} packages of the kernel and the initramfs")
    tree = work / "tree"
    archive.unpack(boot, work / "packages", tree)
    progress("assembling the initramfs")
    entries = imageinitramfs.assemble(
        tree, recipe.programs, recipe.modules, images / "initramfs" / "init", images / "guest"
    )
    imageinitramfs.write_cpio(entries, partial / "initrd", recipe.epoch)
    shutil.copyfile(next((tree / "boot").glob("vmlinuz-*")), partial / "kernel")
    installed: tuple[Package, ...] = ()
    if recipe.root_size is not None:
        files = imageinitramfs.guest_entries(images / "guest")
        target = partial / "root.qcow2"
        installed = imageroot.make_root(
            archive, recipe.root_packages, files, recipe.root_size, recipe.epoch, work, target, progress
        )
        if installed != inputs.root:
            progress("apt's lists are older than the archive; let it fetch them: apt-get update")
    image = Image(
        name=recipe.name,
        digest=inputs.digest,
        kernel=str(folder / "kernel"),
        initrd=str(folder / "initrd"),
        cmdline=recipe.cmdline,
        root=str(folder / "root.qcow2") if installed else None,
        root_format="qcow2" if installed else None,
        root_size=recipe.root_size,
        min_memory=recipe.min_memory,
        built_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        bytes=sum(file.stat().st_blocks * 512 for file in partial.iterdir()),
        disks=recipe.disks,
        packages=tuple(sorted({str(p) for p in (*boot, *installed)})),
    )
    imagestore.publish(image, partial, folder)
    progress(f"built {folder.name}")
    return image


def _boot_packages(closure: Iterable[Package], wanted: Iterable[str]) -> tuple[Package, ...]:
    """What the initramfs can need out of a closure: the named packages, libraries, and the kernel itself."""
    names = frozenset(wanted)
    needed = re.compile(r"lib.*|zlib1g|linux-image-\d.*")
    return tuple(p for p in closure if p.name in names or needed.fullmatch(p.name))


def _digest(recipe: Recipe, *packages: Iterable[Package]) -> str:
    digest = hashlib.sha256(repr(recipe).encode())
    for tree in ("guest", "initramfs"):
        for path in sorted((recipes_folder() / tree).rglob("*")):
            if path.is_file():
                digest.update(f"\n{path.relative_to(recipes_folder())}\n".encode() + path.read_bytes())
    code = [imageinitramfs, imageelf, imagepulse, imagereseed, sys.modules[__name__]]
    for module in (*code, *([imageroot] if recipe.root_packages else [])):
        digest.update(Path(str(module.__file__)).read_bytes())
    for group in packages:
        digest.update("\n".join(["", *map(str, group)]).encode())
    return digest.hexdigest()


@contextmanager
def _work_folder(images: Path, name: str) -> Iterator[Path]:
    """A folder beside the images, for one build at a time; what a killed build left behind is removed."""
    images.mkdir(mode=0o755, parents=True, exist_ok=True)
    images.chmod(images.stat().st_mode | 0o055)  # whatever the umask was: QEMU, another user, boots from here
    with (images / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise BusyError("another image is being built on this machine.", "wait for it and try again") from e
        for left in images.glob(".build-*"):
            shutil.rmtree(left)
        work = images / f".build-{name}"
        work.mkdir(mode=0o700)
        # What is made in here is the guest's, with the guest's modes, not hvctl's.
        own = os.umask(0o022)
        try:
            yield work
        finally:
            os.umask(own)
            shutil.rmtree(work)
