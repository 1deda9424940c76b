"""Many resets of guests that dirty RAM, disks and their own code: while still paused everything is as in the snapshot
by plain reads of the files, and the guest finds its own state. HVCTL_SOAK says how many (`make soak N=10000`)."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from host.fresh import fresh_qemu, saved_stream
from host.outside import MIB, Guest
from host.site import ROOMY, Site
from host.worker import Worker, plant, working
from hvctl.engine.operate import Engine
from hvctl.engine.runtime import open_engine
from hvctl.model.reset import AS_USUAL
from hvctl.operations import snapshot as verbs

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left"), pytest.mark.timeout(86400)]

ROUNDS = int(os.environ.get("HVCTL_SOAK", "300"))
SHARES = (*(10,) * 6, *(20,) * 5, *(50,) * 4, *(100,) * 3, 200, 600)  # per mille of the guest's RAM that is dirtied
ORACLE_EVERY = 50
BALLOON_EVERY = 20
SETTLED = 5


@dataclass(frozen=True)
class Kept:
    """A snapshot as the test itself kept it: RAM, disks, what the guest shows, and a migration stream of it."""

    name: str
    ram: Path
    disks: dict[str, Path]
    state: str
    stream: Path


@contextmanager
def engine_of(site: Site) -> Iterator[Engine]:
    settings = type(site.settings)(
        state_dir=site.settings.state_dir,
        run_dir=site.settings.run_dir,
        ram_dir=site.settings.ram_dir,
        cpu_overcommit=float(ROOMY["HVCTL_CPU_OVERCOMMIT"]),
        memory_overcommit=float(ROOMY["HVCTL_MEMORY_OVERCOMMIT"]),
        audit_every=0,
    )
    with open_engine(settings) as engine:
        yield engine


def kept(engine: Engine, guest: Guest, worker: Worker, name: str, folder: Path) -> Kept:
    """Take a snapshot of the paused guest, and copy by plain means what it should hold."""
    state = worker.show()
    engine.host.domains.pause(guest.uuid)
    verbs.take(engine, guest.name, name)
    vm = engine.host.domains.get(guest.uuid)
    (region,) = vm.ram
    ram = folder / f"{name}.ram"
    subprocess.run(["cp", "--sparse=always", region.path, ram], check=True)
    disks = {str(d.path): folder / f"{name}-{d.target}.qcow2" for d in vm.disks}
    for path, copy in disks.items():
        shutil.copyfile(path, copy)
    stream = saved_stream(guest, folder / f"{name}.stream")
    engine.host.domains.resume(guest.uuid)
    return Kept(name, ram, disks, state, stream)


def assert_as_kept(engine: Engine, guest: Guest, wanted: Kept) -> None:
    """RAM byte by byte, and each disk; the guest is paused."""
    (region,) = engine.host.domains.get(guest.uuid).ram
    now, then = (np.memmap(path, np.uint64, mode="r") for path in (region.path, wanted.ram))
    step = 1 << 19
    unequal = [i for i in range(0, len(now), step) if not np.array_equal(now[i : i + step], then[i : i + step])]
    assert unequal == []
    for path, copy in wanted.disks.items():
        command = ["qemu-img", "compare", "-q", "-U", "-f", "qcow2", "-F", "qcow2", path, str(copy)]
        assert subprocess.run(command, check=False).returncode == 0, f"{path} is not as in {wanted.name}"


def holdings(guest: Guest, site: Site) -> dict[str, Any]:
    """What must not grow from one reset to the next. libvirt has its agent's socket open again first."""
    guest.await_answer()
    files = [p for p in Path(site.settings.ram_dir).rglob("*") if p.is_file()]
    files += Path(site.settings.state_dir, "vms").rglob("*")
    return {
        "qemu descriptors": Counter(_kind(p) for p in Path(f"/proc/{guest.pid}/fd").iterdir()),
        "own descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "block nodes": len(guest.qmp("query-named-block-nodes")),
        "jobs": guest.qmp("query-jobs"),
        "files": len(files),
        "own threads": len(list(Path("/proc/self/task").iterdir())),
    }


@pytest.mark.parametrize(("vcpus", "mib", "disks"), [(1, 128, 1), (2, 256, 2), (1, 512, 3)])
def test_resets_in_a_row(site: Site, tmp_path: Path, vcpus: int, mib: int, disks: int) -> None:
    chosen = random.Random(f"{vcpus} {mib} {disks}")
    options = [w for n in range(disks) for w in ("--disk", f"d{n}:32MiB")]
    memory = ("--vcpus", str(vcpus), "--memory", f"{mib}MiB", "--max-memory", f"{mib}MiB")
    with _folder(site) as folder, site.created(*memory, *options) as guest, engine_of(site) as engine:
        plant(guest, tmp_path)
        site.ok("vm", "start", guest.name)
        guest.await_answer()
        targets = [f"vd{'abc'[n]}" for n in range(disks)]
        arena = mib - 96
        with working(guest, arena, targets) as worker:
            worker.work(1, 50)
            points = [kept(engine, guest, worker, "a", folder)]
            worker.work(2, 50)
            points.append(kept(engine, guest, worker, "b", folder))
            log = guest_log(guest)
            at, before, grown = points[1], {}, 0
            for n in range(1, ROUNDS // 3 + 1):
                # What the guest shows first is what it found after the reset before.
                assert worker.work(chosen.getrandbits(60), chosen.choice(SHARES)) == at.state
                if n % BALLOON_EVERY == 0:
                    engine.host.domains.set_balloon(guest.uuid, (mib - 24) * MIB)
                    engine.host.domains.set_balloon(guest.uuid, mib * MIB)
                at = chosen.choice(points)
                engine.host.domains.pause(guest.uuid)
                done = verbs.reset(engine, guest.name, at.name)
                assert done.result["tracker"] == ("compare" if n % BALLOON_EVERY == 0 else "uffd"), (n, done.result)
                assert_as_kept(engine, guest, at)
                if n % ORACLE_EVERY == 0:
                    seed, part = chosen.getrandbits(60), 100
                    with fresh_qemu(guest, at.ram, at.disks, at.stream, folder) as other:
                        expected = [other.work(seed, part), other.show()]
                    engine.host.domains.resume(guest.uuid)
                    assert [worker.work(seed, part), worker.show()] == expected
                    assert expected[0] == at.state
                    engine.host.domains.pause(guest.uuid)
                    verbs.reset(engine, guest.name, at.name)
                engine.host.domains.resume(guest.uuid)
                if n == SETTLED:
                    before, grown = holdings(guest, site), _resident(os.getpid())
            assert worker.show() == at.state
            after = holdings(guest, site)
            assert {k: (before[k], v) for k, v in after.items() if before[k] != v} == {}
            assert _resident(os.getpid()) < grown + 64 * MIB
            # The guest's log went back with it: all that is new in it came from the reset itself.
            assert [line for line in guest_log(guest) if line not in log] == []
            for point in points:
                verbs.delete(engine, guest.name, point.name)


def _kind(descriptor: Path) -> str:
    """What it is of, without the number that tells two of a kind apart."""
    return str(descriptor.readlink()).partition("[")[0] if descriptor.is_symlink() else ""


def guest_log(guest: Guest) -> list[str]:
    guest.await_answer()
    return guest.run("dmesg").splitlines()


@contextmanager
def _folder(site: Site) -> Iterator[Path]:
    """On the tmpfs, as what it is compared with."""
    folder = Path(site.settings.ram_dir, "kept")
    folder.mkdir(mode=0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def test_uniqueness_and_what_it_is_without_the_hook(site: Site, tmp_path: Path) -> None:
    """Twenty resets from one snapshot: what getrandom gives is new each time, and the same where nobody reseeds."""
    options = ("--memory", "128MiB", "--max-memory", "128MiB", "--disk", "d0:32MiB")
    with site.created(*options) as guest, engine_of(site) as engine:
        plant(guest, tmp_path)
        site.ok("vm", "start", guest.name)
        guest.await_answer()
        with working(guest, 1, []) as worker:
            worker.random()
            verbs.take(engine, guest.name, "s")
            found = []
            for _ in range(20):
                done = verbs.reset(engine, guest.name, "s")
                assert done.result["uniqueness"] == "reseeded"
                found.append(worker.random())
            assert len(set(found)) == 20
            verbs.delete(engine, guest.name, "s")
            assert any(repeats(engine, guest, worker) for _ in range(6)), "this test could not fail"


def repeats(engine: Engine, guest: Guest, worker: Worker) -> bool:
    """Whether anything comes twice where nobody reseeds. A kernel that was about to reseed by itself when the snapshot
    was taken does so after each reset, with what interrupts brought it since; it does so the less often the longer it
    runs."""
    worker.random()
    verbs.take(engine, guest.name, "s")
    silent = []
    for _ in range(3):
        done = verbs.reset(engine, guest.name, "s", wishes=type(AS_USUAL)(reseed=False, clock=False))
        assert done.result["uniqueness"] == "not guaranteed"
        silent.append(worker.random())
    verbs.delete(engine, guest.name, "s")
    return len(set(silent)) < 3


def test_the_journal_tells_what_a_reset_took(site: Site) -> None:
    with site.created("--memory", "128MiB", "--max-memory", "128MiB", "--start") as guest:
        site.ok("snapshot", "take", guest.name, "s", "--tracker", "auto")
        done = site.json("reset", guest.name, "--to", "s", "--audit")
        for key in ("paused", "continued_after", "first_life", "bytes", "pages", "tracker", "uniqueness", "coherence"):
            assert key in done["result"], key
        assert done["result"]["missed"] == 0
        stored = json.loads(site.ok("-f", "json", "operation", "show", str(done["operation"])))["operation"]
        assert stored["result"]["paused"] == done["result"]["paused"]
        parts = site.json("reset", guest.name, "--to", "s", "--only", "ram", "--accept-incoherent", "--dry-run")
        assert (parts["result"]["coherence"], parts["result"]["scope"]) == ("incoherent", ["ram"])
        assert "missed" not in site.json("reset", guest.name, "--to", "s", "--no-audit")["result"]
        again = site.json("reset", guest.name, "--to", "s", "--dry-run")
        assert again["result"]["expected"]["resets"] == 2
        site.ok("snapshot", "delete", guest.name, "s")
