"""Assembles the initramfs of the guest images and writes it as a cpio archive, the same bytes for the same packages."""

from __future__ import annotations

import lzma
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hvctl.adapters.images.imagepulse import answer_program
from hvctl.adapters.images.imagereseed import reseed_program
from hvctl.adapters.tools import run_tool
from hvctl.errors import HvctlError

_LOADER = "/lib64/ld-linux-x86-64.so.2"
_LIBRARY_FOLDERS = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
# Both images have these: /usr is merged, and what changes at run time lies on a tmpfs.
_FOLDERS = (
    "data",
    "dev",
    "proc",
    "root",
    "run",
    "sys",
    "sysroot",
    "tmp",
    "usr/bin",
    "usr/lib",
    "usr/lib64",
    "usr/sbin",
    "var",
)
_LINKS = {
    "bin": "usr/bin",
    "lib": "usr/lib",
    "lib64": "usr/lib64",
    "sbin": "usr/sbin",
    "var/run": "/run",
}
GUEST_LINKS = {
    "etc/mtab": "/proc/self/mounts",
    "etc/resolv.conf": "/run/resolv.conf",
    "usr/sbin/init": "/usr/bin/busybox",
}
RESEED_PATH = "usr/libexec/hvctl-reseed"
ANSWER_PATH = "usr/libexec/hvctl-answer"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of an archive: its mode with the type bits, and its bytes (of a link: its target)."""

    mode: int
    data: bytes = b""


def folder() -> Entry:
    return Entry(stat.S_IFDIR | 0o755)


def link(target: str) -> Entry:
    return Entry(stat.S_IFLNK | 0o777, target.encode())


def file(data: bytes, executable: bool) -> Entry:
    return Entry(stat.S_IFREG | (0o755 if executable else 0o644), data)


def write_cpio(entries: Mapping[str, Entry], path: Path, mtime: int) -> None:
    """The archive in the kernel's "newc" form (Documentation/driver-api/early-userspace/buffer-format.rst): sorted,
    owned by root, one time for all. It is not compressed: unpacking under TCG costs more than loading it."""
    every = dict(entries)
    for name in entries:
        for parent in Path(name).parents:
            if str(parent) != ".":
                every.setdefault(str(parent), folder())
    with path.open("wb") as out:
        for inode, (name, entry) in enumerate([*sorted(every.items()), ("TRAILER!!!", Entry(0))], start=1):
            encoded = name.encode() + b"\0"
            fields = (inode, entry.mode, 0, 0, 1, mtime, len(entry.data), 0, 0, 0, 0, len(encoded), 0)
            header = b"070701" + b"".join(b"%08X" % f for f in fields)
            for part in (header + encoded, entry.data):
                out.write(part + bytes(-len(part) % 4))


def tree_entries(folder: Path) -> Iterator[tuple[str, Entry]]:
    """The files of a recipe's tree. A file that begins with #! is a program: a wheel does not keep modes."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            yield path.relative_to(folder).as_posix(), file(data, executable=data.startswith(b"#!"))


def guest_entries(guest: Path) -> dict[str, Entry]:
    """What both images get on top of their packages."""
    entries = dict(tree_entries(guest))
    entries |= {name: link(target) for name, target in GUEST_LINKS.items()}
    entries[RESEED_PATH] = file(reseed_program(), executable=True)
    entries[ANSWER_PATH] = file(answer_program(), executable=True)
    return entries


def _find(tree: Path, name: str) -> Path:
    """A file of unpacked packages; both places of a merged /usr are tried, since packages differ in it."""
    for candidate in (tree / name.lstrip("/"), tree / "usr" / name.lstrip("/"), tree / name.removeprefix("/usr/")):
        if candidate.exists():
            return candidate
    raise HvctlError(f"the packages of the image hold no {name}.")


def _merged(tree: Path, path: Path) -> str:
    name = path.relative_to(tree).as_posix()
    return name if name.startswith("usr/") else f"usr/{name}"


def _libraries(tree: Path, program: Path) -> dict[str, Path]:
    """Soname to file of everything a program loads, as the packages' own dynamic loader resolves it."""
    if _LOADER.encode() not in program.read_bytes()[:4096]:
        return {}
    path = ":".join(str(tree / f) for f in _LIBRARY_FOLDERS)
    loader = _find(tree, _LOADER).resolve()
    answer = run_tool([loader, "--inhibit-cache", "--library-path", path, "--list", program])
    found = {m[1]: Path(m[2]) for m in re.finditer(r"^\s*([^/\s]+) => (\S+) \(0x", answer.stdout, re.MULTILINE)}
    for soname, where in found.items():
        # The loader falls back to the host's own libraries, which must never get into an image.
        if not where.is_relative_to(tree):
            raise HvctlError(f"{program.name} needs {soname}, which is in none of the image's packages.")
    return found


def module_order(modules: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """Kernel modules (file name to content) with everything they depend on, dependencies first, as each module's own
    .modinfo says. What the kernel has built in needs no file: which modules that is differs between releases."""
    files = {_module_name(p.name): p for p in modules.rglob("*.ko*")}
    listed = modules / "modules.builtin"
    built_in = {_module_name(Path(line).name) for line in listed.read_text().split()} if listed.exists() else set()
    ordered: dict[str, bytes] = {}
    seen: set[str] = set()

    def add(name: str) -> None:
        if name in seen or name in built_in:
            return
        seen.add(name)
        if name not in files:
            raise HvctlError(f"the kernel has no module {name}.")
        content = _unpacked(files[name])
        match = re.search(rb"\0depends=([^\0]*)\0", content)
        for dependency in match[1].decode().split(",") if match else ():
            if dependency:
                add(dependency.replace("-", "_"))
        ordered[files[name].name.removesuffix(".xz")] = content

    for name in wanted:
        add(name.replace("-", "_"))
    return ordered


def _module_name(file: str) -> str:
    return file.split(".ko")[0].replace("-", "_")


def _unpacked(module: Path) -> bytes:
    """busybox loads no compressed module, which is what Debian 13 has."""
    if module.suffix == ".xz":
        return lzma.decompress(module.read_bytes())
    if module.suffix != ".ko":
        raise HvctlError(f"the kernel module {module.name} is compressed in a way that hvctl cannot read.")
    return module.read_bytes()


def assemble(tree: Path, programs: Iterable[str], modules: Iterable[str], init: Path, guest: Path) -> dict[str, Entry]:
    """The archive's entries out of unpacked packages, the recipe's /init and the tree of the guest's scripts."""
    entries = {name: folder() for name in _FOLDERS}
    entries |= {name: link(target) for name, target in _LINKS.items()}
    libraries: dict[str, Path] = {}
    for name in programs:
        program = _find(tree, name)
        entries[_merged(tree, program)] = file(program.read_bytes(), executable=True)
        libraries |= _libraries(tree, program)
    for soname, where in libraries.items():
        entries[f"usr/lib/x86_64-linux-gnu/{soname}"] = file(where.read_bytes(), executable=False)
    if libraries:
        entries[f"usr{_LOADER}"] = file(_find(tree, _LOADER).read_bytes(), executable=True)
    order = module_order(next(tree.glob("**/lib/modules/*")), modules)
    entries |= {f"usr/lib/modules/{name}": file(content, executable=False) for name, content in order.items()}
    entries["etc/modules"] = file("".join(f"/lib/modules/{name}\n" for name in order).encode(), executable=False)
    for applet in run_tool([_find(tree, "/bin/busybox"), "--list"]).stdout.split():
        for place in ("usr/bin", "usr/sbin"):
            entries.setdefault(f"{place}/{applet}", link("/usr/bin/busybox"))
    entries |= guest_entries(guest)
    entries["init"] = file(init.read_bytes(), executable=True)
    return entries
