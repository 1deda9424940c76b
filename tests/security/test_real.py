"""The promises on a real host: who owns what while a VM runs, what its guest can make hvctl do, who may ask, and what
a full disk leaves."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from contract.real import await_true

from hvctl.adapters.images import imagestore
from hvctl.adapters.kernel.process import qemu_owner
from hvctl.settings import Settings

pytestmark = pytest.mark.host

ROOT = Path(__file__).parents[2]
NAME = f"security-{os.getpid()}"
NOBODY = 65534
URN = "urn:hvctl:vm:1"
EVERYBODY = stat.S_IROTH | stat.S_IWOTH | stat.S_IRGRP | stat.S_IWGRP


@dataclass(frozen=True)
class Place:
    settings: Settings

    def run(self, *words: str, umask: int = 0o022, prefix: tuple[str, ...] = (), **more: str) -> Any:
        folders = {f"HVCTL_{n.upper()}": getattr(self.settings, n) for n in ("state_dir", "run_dir", "ram_dir")}
        return subprocess.run(
            [*prefix, sys.executable, "-m", "hvctl", *words],
            env={**os.environ, **folders, "PYTHONDONTWRITEBYTECODE": "1", **more},
            capture_output=True, text=True, errors="replace", timeout=120, check=False, umask=umask,
        )  # fmt: skip

    def ok(self, *words: str, umask: int = 0o022) -> str:
        done = self.run(*words, umask=umask)
        assert done.returncode == 0, (words, done.stderr)
        return str(done.stdout)

    def json(self, *words: str) -> Any:
        return json.loads(self.ok("-f", "json", *words))


def copied_image(settings: Settings) -> Path:
    """An image of its own, so that what happens to its files is seen, and nobody else's VM is touched."""
    image = imagestore.find(Settings(), "micro")
    folder = settings.images_dir / Path(image.kernel).parent.name
    shutil.copytree(Path(image.kernel).parent, folder)
    manifest = folder / imagestore.MANIFEST
    manifest.write_text(manifest.read_text().replace(str(Settings().images_dir), str(settings.images_dir)))
    for file in folder.iterdir():
        os.chown(file, 0, 0)
    kept = Path(Settings().state_dir) / "kvm.json"
    if kept.exists():  # or the first VM would wait for a probe of KVM
        shutil.copy(kept, settings.state_dir)
    return folder


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with ExitStack() as made:
        folders = []
        for parent in ("/var/tmp", "/var/tmp", "/dev/shm"):
            folders.append(tempfile.mkdtemp(prefix="hvctl-security-", dir=parent))
            made.callback(shutil.rmtree, folders[-1])
        # Mounted before QEMU starts, which keeps the mounts of its start.
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500m,mode=700", "tmpfs", folders[2]], check=True)
        made.callback(subprocess.run, ["umount", folders[2]], check=True)
        yield Place(Settings(state_dir=folders[0], run_dir=folders[1], ram_dir=folders[2]))


@pytest.fixture(scope="module")
def image(place: Place) -> Path:
    return copied_image(place.settings)


@pytest.fixture(scope="module")
def vm(place: Place, image: Path) -> Iterator[str]:
    """Booted, with a snapshot s1; created under umask 022, snapshot under 077, in folders that are 0700 at first."""
    place.ok("vm", "create", NAME, "--image", "micro", "--start")
    try:
        await_true(lambda: place.run("vm", "exec", NAME, "--", "true").returncode == 0, "the guest has booted")
        place.ok("snapshot", "take", NAME, "s1", umask=0o077)
        yield NAME
    finally:
        place.ok("vm", "delete", NAME, "--force")


def owner(path: Path) -> tuple[int, int]:
    return path.lstat().st_uid, path.lstat().st_gid


def readable_by_others(path: Path) -> bool:
    """Whether another user could open it, with the folders on the way."""
    if not path.lstat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
        return False
    return all(p.stat().st_mode & stat.S_IXOTH for p in path.parents)


def test_t03_modes_and_owners_while_a_vm_runs_and_has_a_snapshot(vm: str, place: Place) -> None:
    qemu = qemu_owner()
    shown = place.json("vm", "show", vm)["vm"]
    ours = [Path(getattr(place.settings, n)) for n in ("state_dir", "run_dir", "ram_dir")]
    seen = set()
    for path in (p for root in ours for p in root.rglob("*")):
        if path.is_relative_to(place.settings.images_dir) or path.is_symlink():
            continue
        seen.add(path.name)
        of_qemu = path.name in {"data.qcow2", "vmstate.qcow2", "qmp", "monitor.sock", "pulse.in", "pulse.out"}
        assert owner(path) == (qemu if of_qemu else (0, 0)), path
        assert not readable_by_others(path) or path.is_dir(), path
        if path.is_file():
            assert not path.stat().st_mode & EVERYBODY, path
        if path.is_dir():
            assert not path.stat().st_mode & EVERYBODY, path
    assert seen >= {"data.qcow2", "vmstate.qcow2", "monitor.sock", "manifest.json", "ram", "index", "tracking.json"}
    assert seen >= {"hvctl.db", "kvm.json"}
    (ram,) = (Path(r["path"]) for r in shown["ram"])
    assert owner(ram) == qemu
    assert not readable_by_others(ram)


def test_t04_what_vms_share_stays_roots(vm: str, place: Place, image: Path) -> None:
    """libvirt gives the files that it knows of to QEMU's user; one hostile QEMU could then change every VM's kernel."""
    for when in ("while it runs", "after another VM of the image came and went"):
        for file in image.iterdir():
            assert owner(file) == (0, 0), (when, file)
            assert not file.stat().st_mode & 0o222, (when, file)
        if when == "while it runs":
            place.ok("vm", "create", f"{NAME}-b", "--image", "micro", "--start")
            place.ok("vm", "delete", f"{NAME}-b", "--force")
    place.ok("vm", "exec", vm, "--", "true")


def test_t02_nobody_else_connects_to_the_monitor(vm: str, place: Place) -> None:
    (monitor,) = place.settings.vms_dir.glob("*/qmp/monitor.sock")
    code = f"import os, socket; os.setgid({NOBODY}); os.setuid({NOBODY}); " \
        f"socket.socket(socket.AF_UNIX).connect({str(monitor)!r})"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "PermissionError" in done.stderr


def test_t21_a_guest_cannot_write_to_the_terminal(vm: str, place: Place) -> None:
    import pty

    master, slave = pty.openpty()
    folders = {f"HVCTL_{n.upper()}": getattr(place.settings, n) for n in ("state_dir", "run_dir", "ram_dir")}
    words = ["vm", "exec", vm, "--", "printf", r"\033]0;owned\007\233ok"]
    subprocess.run(
        [sys.executable, "-m", "hvctl", *words], env={**os.environ, **folders}, stdout=slave, check=True, timeout=60
    )
    os.close(slave)
    said = os.read(master, 4096)
    os.close(master)
    assert b"ok" in said
    assert not {0x1B, 0x07, 0x9B} & set(said)


def test_t28_a_tampered_snapshot_is_refused_before_the_guest_is_paused(vm: str, place: Place) -> None:
    (manifest,) = place.settings.snapshots_dir.glob("*/*/manifest.json")
    sound = manifest.read_text()
    for change in ({"targets": {}}, {"regions": []}, {"tag": "x"}, {"folder": "/elsewhere"}, {"parent": "none"}):
        manifest.write_text(json.dumps({**json.loads(sound), **change}))
        done = place.run("reset", vm, "--to", "s1")
        assert done.returncode in (3, 5), (change, done.stderr)
    binding = json.loads(sound)["binding"]
    binding["process"]["pid"] += 1
    manifest.write_text(json.dumps({**json.loads(sound), "binding": binding}))
    assert place.run("reset", vm, "--to", "s1").returncode == 5
    manifest.write_text(sound)
    index = manifest.with_name("index")
    rows = index.read_bytes()
    for damaged in (
        rows[:-4],
        (1 << 30).to_bytes(4, "little") + rows[4:],
        (-3).to_bytes(4, "little", signed=True) + rows[4:],
    ):
        index.write_bytes(damaged)
        done = place.run("reset", vm, "--to", "s1")
        assert (done.returncode in (3, 5), "Traceback" in done.stderr) == (True, False), done.stderr
    index.write_bytes(rows)
    assert place.json("vm", "show", vm)["vm"]["state"] == "running"
    assert place.json("operation", "list", "--state", "open")["operations"] == []
    place.ok("reset", vm, "--to", "s1", "--audit")
    await_true(lambda: place.run("vm", "exec", vm, "--", "true").returncode == 0, "the guest answers")


def metadata(vm: str) -> str:
    return subprocess.run(["virsh", "metadata", vm, URN], capture_output=True, text=True, check=True).stdout


def test_t09_a_record_that_somebody_edited_breaks_no_command(vm: str, place: Place) -> None:
    try:
        for nonsense in ("{", '{"allocation": {"vcpus": -4, "memory": -1}}', "z" * 200_000):
            for where in ("--live", "--config"):
                subprocess.run(
                    ["virsh", "metadata", vm, URN, where, "--key", "hvctl", "--set", f"<vm>{nonsense[:100_000]}</vm>"],
                    check=True, capture_output=True,
                )  # fmt: skip
            assert vm in place.ok("vm", "list")
            place.ok("vm", "show", vm)
            place.ok("allocate", vm, "--cpu-weight", "200", "--dry-run")
            drift = place.run("doctor", "--probe", "drift")
            assert vm in drift.stdout
            assert "Traceback" not in drift.stderr
    finally:
        place.run("doctor", "--probe", "drift", "--fix")  # the database knows it still
    assert json.loads(metadata(vm).partition(">")[2].partition("<")[0])["image"] == "micro"


PASSABLE = """
set -e
t=$(mktemp -d)
for place in "$@"; do
  n=$(echo "$place" | tr / _); mkdir "$t/$n"; mount --bind "$place" "$t/$n"
done
for place in "$@"; do
  top=/$(echo "$place" | cut -d/ -f2)
  done="$t/done$(echo "$top" | tr / _)"
  [ -e "$done" ] || { mount -t tmpfs -o mode=755 tmpfs "$top"; touch "$done"; }
done
for place in "$@"; do
  mkdir -p "$place"; mount --bind "$t/$(echo "$place" | tr / _)" "$place"
done
umount -l "$t"/_* 2>/dev/null || true
"""

# One of each way in: libvirt, the database, images, folders, nothing.
COMMANDS = (
    "vm list", "doctor", "host prepare", "host prepare --yes", "config show", "operation list", "recover", "image list",
    "image build micro", "image delete micro", "snapshot take x", "vm create x --image micro", "vm exec x -- true",
)  # fmt: skip


def test_t26_who_is_not_root_gets_a_sentence(vm: str, place: Place) -> None:
    """In a mount namespace where others may reach this Python and this checkout, wherever they are."""
    needed = {Path(sys.base_prefix), Path(sys.prefix), ROOT}
    closed = sorted({p for p in needed if any(not q.stat().st_mode & stat.S_IXOTH for q in (p, *p.parents))})
    outer = [p for p in closed if not any(p != q and p.is_relative_to(q) for q in closed)]
    script = PASSABLE if outer else ""
    drop = f"setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups"
    lines = [
        f'{drop} "$PY" -m hvctl {c} </dev/null >"$OUT/{i}" 2>&1; echo $? >"$OUT/{i}.status"'
        for i, c in enumerate(COMMANDS)
    ]
    with tempfile.TemporaryDirectory(dir="/var/tmp") as out:
        folders = {f"HVCTL_{n.upper()}": getattr(place.settings, n) for n in ("state_dir", "run_dir", "ram_dir")}
        subprocess.run(
            ["unshare", "-m", "sh", "-c", f"{script}\nset +e\ncd /\n" + "\n".join(lines), "sh", *map(str, outer)],
            env={**os.environ, **folders, "PY": sys.executable, "OUT": out, "PYTHONPATH": str(ROOT),
                 "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/nonexistent"},
            check=True, timeout=150,
        )  # fmt: skip
        for i, command in enumerate(COMMANDS):
            said, status = (Path(out) / str(i)).read_text(), int((Path(out) / f"{i}.status").read_text())
            assert "Traceback" not in said, (command, said)
            if command in ("config show", "image list"):
                assert status == 0, (command, said)
            elif command == "doctor":
                assert (status, "failing" in said) == (1, True), said
            else:
                assert status == 4, (command, status, said)
                assert "hint:" in said, (command, said)
    assert place.json("vm", "show", vm)["vm"]["state"] == "running"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 40 MiB with a state folder that QEMU's user may pass."""
    folder = Path(tempfile.mkdtemp(prefix="hvctl-small-", dir="/var/tmp"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m,mode=711", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)
    folder.rmdir()


def test_t19_a_full_disk_leaves_nothing_and_the_same_command_succeeds_after(small: Path) -> None:
    place = Place(Settings(state_dir=str(small), run_dir=str(small / "run"), ram_dir=str(small / "ram")))
    copied_image(place.settings)
    filler = small / "filler"
    create = ("vm", "create", f"{NAME}-full", "--image", "micro")

    def fill(left: int) -> None:
        free = os.statvfs(small).f_bavail * 4096
        with filler.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(4096, free - left))

    for left in (0, 64 << 10, 200 << 10):
        fill(left)
        done = place.run(*create)
        assert done.returncode not in (0, 9), (left, done.stdout, done.stderr)
        assert done.stderr.startswith("hvctl: "), done.stderr
        assert "Traceback" not in done.stderr
        filler.unlink()
        place.ok("recover")  # of an operation that could not even be closed
        assert list(place.settings.vms_dir.glob("*")) == [], (left, done.stderr)
    place.ok(*create)
    place.ok("vm", "delete", f"{NAME}-full")


def stored(place: Place) -> list[Path]:
    """Files and folders of snapshots; what a tracker notes beside them comes and goes."""
    return sorted(p for p in place.settings.snapshots_dir.rglob("*") if p.name != "carried")


def test_t19_a_snapshot_that_finds_no_room_leaves_the_guest_as_it_was(vm: str, place: Place) -> None:
    before = stored(place)
    filler = Path(place.settings.ram_dir) / "filler"
    free = os.statvfs(filler.parent).f_bavail * 4096
    with filler.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, free - (1 << 20))
    done = place.run("snapshot", "take", vm, "s2")
    filler.unlink()
    assert (done.returncode, "no space" in done.stderr) == (5, True), done.stderr
    assert stored(place) == before
    assert place.json("vm", "show", vm)["vm"]["state"] == "running"
    place.ok("snapshot", "take", vm, "s2")
    place.ok("snapshot", "delete", vm, "s2")
    assert stored(place) == before


# Runs its arguments, and says at last how many KiB they took at most.
LARGEST_CHILD = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print("\\n" + str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss), end="", flush=True)
sys.exit(status)
"""


def test_t19_a_flood_of_output_is_bounded(vm: str, place: Place) -> None:
    """Last of all: libvirt gives an agent up that answers too much."""
    cut = place.run("-f", "json", "vm", "exec", vm, "--max-output", "1KiB", "--", "sh", "-c", "yes | head -c 1000000")
    assert len(json.loads(cut.stdout)["exec"]["stdout"]) == 1024
    flood = ("vm", "exec", vm, "--", "sh", "-c", "yes 0123456789abcdef | head -c 25000000")
    done = place.run(*flood, prefix=(sys.executable, "-c", LARGEST_CHILD))
    output, _, largest = done.stdout.rpartition("\n")
    assert len(output) <= 1 << 20
    assert done.returncode == 0 or done.stderr.startswith("hvctl: "), done.stderr
    assert int(largest) < 300 << 10
