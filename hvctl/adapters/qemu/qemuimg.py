"""The one caller of qemu-img; every call names the format of every image, so no guest can have one guessed.

A guest owns the bytes of a raw disk and may write an image header there. An image file may name other files to read:
its whole chain is checked before anything opens it for real, and nothing outside the given folders is accepted.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hvctl.adapters.tools import run_tool
from hvctl.errors import HvctlError, RefusedError

_FORMATS = frozenset({"qcow2", "raw"})
_QCOW2_MAGIC = b"QFI\xfb"
_EXTERNAL_DATA_FILE = 1 << 2
_CHAIN_LIMIT = 16
_LEAKS = 3  # the exit status of "qemu-img check" for clusters that nothing refers to


def _name(path: Path | str) -> str:
    # An absolute name cannot be taken for "protocol:…".
    return str(Path(path).absolute())


def _format(name: str) -> str:
    if name not in _FORMATS:
        raise RefusedError(f"images of the format {name!r} are not used by hvctl.", "convert it to qcow2 first")
    return name


def _reserve(path: Path) -> None:
    """An empty file of ours alone, that qemu-img then fills: it would make one that everybody can read."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _create(path: Path, *arguments: str) -> None:
    _reserve(path)
    try:
        run_tool(["qemu-img", "create", "-q", "-f", "qcow2", *arguments])
        with path.open("rb") as created:
            os.fsync(created.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def create_overlay(path: Path, backing: Path, backing_format: str, size: int | None = None) -> None:
    """A thin qcow2 image over `backing`, as large as it or `size` bytes; FileExistsError if `path` is there."""
    sized = () if size is None else (str(size),)
    _create(path, "-F", _format(backing_format), "-b", _name(backing), _name(path), *sized)


def create_empty(path: Path, size: int) -> None:
    """An empty qcow2 image of `size` bytes; FileExistsError if `path` is there."""
    _create(path, _name(path), str(size))


def convert(source: Path, source_format: str, target: Path) -> None:
    """A qcow2 copy; sequential, so that the same source gives the same bytes."""
    run_tool(["qemu-img", "convert", "-q", "-f", _format(source_format), "-O", "qcow2", _name(source), _name(target)])


def info(path: Path, format: str) -> dict[str, Any]:
    """What the image says about itself; it may be open in a running QEMU. Nothing it refers to is opened."""
    if _format(format) == "qcow2":
        _check_header(path)
    output = run_tool(["qemu-img", "info", "-U", "--output=json", "-f", format, _name(path)]).stdout
    try:
        answer = json.loads(output)
    except ValueError as e:
        raise HvctlError(f"qemu-img info says nothing readable about {path}.") from e
    if not isinstance(answer, dict):
        raise HvctlError(f"qemu-img info says nothing readable about {path}.")
    return answer


def _check_header(path: Path) -> None:
    """Refuse a qcow2 image with an external data file before qemu-img sees it: it would open that file.

    The layout is QEMU's docs/interop/qcow2.txt: version at byte 4, incompatible features at byte 72 from version 3.
    """
    try:
        with path.open("rb") as image:
            header = image.read(80)
    except OSError as e:
        raise HvctlError(f"the image {path} cannot be read: {e.strerror}.") from e
    if len(header) < 80 or not header.startswith(_QCOW2_MAGIC):
        raise RefusedError(f"{path} is not a qcow2 image.")
    version = struct.unpack_from(">I", header, 4)[0]
    if version >= 3 and struct.unpack_from(">Q", header, 72)[0] & _EXTERNAL_DATA_FILE:
        raise RefusedError(
            f"the image {path} keeps its data in another file.", "convert it to a plain qcow2 image first"
        )


def check_chain(path: Path, format: str, folders: Collection[Path]) -> tuple[Path, ...]:
    """The files an image consists of, itself first; RefusedError if one of them lies outside `folders`."""
    return tuple(layer for layer, _ in _chain(path, format, folders))


def _chain(path: Path, format: str, folders: Collection[Path]) -> list[tuple[Path, str]]:
    allowed = [folder.resolve() for folder in folders]
    chain: list[tuple[Path, str]] = []
    next_path, next_format = path, format
    while True:
        real = next_path.resolve()
        if not any(real.is_relative_to(folder) for folder in allowed):
            raise RefusedError(f"the image {path} reads {real}, which lies outside hvctl's folders.")
        if any(real == layer for layer, _ in chain) or len(chain) == _CHAIN_LIMIT:
            raise RefusedError(f"the image {path} has a chain of backing files that is a loop or too long.")
        if not real.is_file():
            raise RefusedError(f"the image {path} needs {real}, which is not a file.")
        chain.append((real, next_format))
        answer = info(real, next_format)
        backing = answer.get("backing-filename")
        if backing is None:
            return chain
        if not backing.startswith("/"):
            raise RefusedError(f"the image {real} has the backing file {backing!r}, which is not an absolute path.")
        if "backing-filename-format" not in answer:
            raise RefusedError(f"the image {real} does not say what format its backing file has.")
        next_path, next_format = Path(backing), _format(answer["backing-filename-format"])


def backing_file(path: Path) -> Path | None:
    """The backing file that a qcow2 image names."""
    name = info(path, "qcow2").get("backing-filename")
    return None if name is None else Path(name)


def list_internal_snapshots(path: Path) -> tuple[str, ...]:
    """Names of the snapshots inside a qcow2 image."""
    return tuple(str(s["name"]) for s in info(path, "qcow2").get("snapshots", ()))


def delete_internal_snapshot(path: Path, name: str) -> None:
    """Remove one snapshot of an image that no QEMU has open; absent already is fine. What only it had becomes a hole in
    the file."""
    if name in list_internal_snapshots(path):
        run_tool(["qemu-img", "snapshot", "-q", "-d", name, _json(_alone(path))])


def apply_internal_snapshot(path: Path, name: str) -> None:
    """Make an image that no QEMU has open what it was at one of its snapshots; every snapshot stays in it. What only
    the state that goes away had becomes a hole in the file. Nothing the image refers to is opened."""
    _check_header(path)
    run_tool(["qemu-img", "snapshot", "-q", "-a", name, _json(_alone(path))])


def create_internal_snapshot(path: Path, name: str) -> None:
    """Have an image that no QEMU has open hold what it is now under a name."""
    _check_header(path)
    run_tool(["qemu-img", "snapshot", "-q", "-c", name, _json(_alone(path))])


def extract_internal_snapshot(source: Path, name: str, target: Path, folders: Collection[Path]) -> None:
    """A new qcow2 image `target` of what `source` was at one of its snapshots, over the same backing image: it has the
    clusters that are the snapshot's own. A QEMU may have `source` open and its guest may write: what belongs to a
    snapshot never changes. What it reads has to lie in `folders`. FileExistsError if `target` is there."""
    chain = _chain(source, "qcow2", folders)
    over = [argument for path, format in chain[1:2] for argument in ("-B", _name(path), "-F", format)]
    chosen = ["-l", f"snapshot.name={name}"]
    _reserve(target)
    try:
        image = _json(_spelled(chain))
        run_tool(["qemu-img", "convert", "-q", "-U", *chosen, "-O", "qcow2", *over, image, _name(target)])
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def check(path: Path) -> None:
    """HvctlError if the metadata of a qcow2 image that no QEMU has open are damaged; clusters that nothing refers to
    are no damage. Nothing the image refers to is opened."""
    _check_header(path)
    run_tool(["qemu-img", "check", "-q", _json(_alone(path))], accept=frozenset({0, _LEAKS}))


def copy_extent(source: Path, target: Path, start: int, end: int, folders: Collection[Path]) -> None:
    """Give a guest of `target` the bytes of `source` from `start` to `end`, which are multiples of 512; the rest of it
    and its snapshots stay. Both are qcow2 and closed; what they read has to lie in `folders`. Zeroes take no room."""

    def extent(path: Path) -> str:
        image = _spelled(_chain(path, "qcow2", folders))
        return _json({"driver": "raw", "offset": start, "size": end - start, "discard": "unmap", "file": image})

    run_tool(["qemu-img", "convert", "-q", "-n", "-f", "raw", "-O", "raw", extent(source), extent(target)])


def compare(a: Path, a_format: str, b: Path, b_format: str) -> bool:
    """Whether two images show a guest the same bytes."""
    argv = ["qemu-img", "compare", "-q", "-U", "-f", _format(a_format), "-F", _format(b_format), _name(a), _name(b)]
    return run_tool(argv, accept=frozenset({0, 1})).returncode == 0


def _file(path: Path) -> dict[str, Any]:
    return {"driver": "file", "filename": _name(path), "discard": "unmap"}


def _spelled(chain: Sequence[tuple[Path, str]]) -> dict[str, Any]:
    """An image spelled out down to its end: nothing is opened because of what a header says by then."""
    image: dict[str, Any] = {}
    for layer, format in reversed(chain):
        below = {"backing": image or None} if format == "qcow2" else {}
        image = {"driver": format, "discard": "unmap", "file": _file(layer), **below}
    return image


def _alone(path: Path) -> dict[str, Any]:
    return {"driver": "qcow2", "backing": None, "file": _file(path)}


def _json(options: dict[str, Any]) -> str:
    """An image by its options; only this form can say that there is no backing image."""
    return f"json:{json.dumps(options)}"
