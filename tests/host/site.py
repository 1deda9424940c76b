"""hvctl as a command on the real host, in folders and on a bridge of a test's own; and what of it is left."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from host import connection
from host.loaded import Loaded
from host.outside import Guest, alive, await_true, domains, ifbs, virsh
from hvctl.adapters.images import imagestore
from hvctl.adapters.node import kvmprobe
from hvctl.engine.lock import free
from hvctl.settings import Settings

# Other VMs of this host count against its capacity; the tests of admission set a capacity of their own.
ROOMY = {"HVCTL_CPU_OVERCOMMIT": "1000", "HVCTL_MEMORY_OVERCOMMIT": "1000"}
SECONDS = 180
_numbers = itertools.count()


@dataclass(frozen=True)
class Site:
    settings: Settings
    bridge: str
    prefix: str
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HVCTL_STATE_DIR": self.settings.state_dir,
            "HVCTL_RUN_DIR": self.settings.run_dir,
            "HVCTL_RAM_DIR": self.settings.ram_dir,
            **ROOMY,
        }

    # --- the command

    @property
    def loaded(self) -> Loaded:
        return Loaded(self.environment)

    def command(self, argv: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "hvctl", *argv]

    def run(
        self, *argv: str, fault: str = "", env: Mapping[str, str] | None = None, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return self.loaded.run(*argv, fault=fault, env=env, stdin=stdin)

    def ok(self, *argv: str, env: Mapping[str, str] | None = None, stdin: str = "") -> str:
        """What a command that has to succeed prints."""
        done = self.run(*argv, env=env, stdin=stdin)
        assert done.returncode == 0, (argv, done.returncode, done.stdout, done.stderr)
        return done.stdout

    def json(self, *argv: str, env: Mapping[str, str] | None = None) -> Any:
        document = json.loads(self.ok("-f", "json", *argv, env=env))
        assert document.pop("schema_version") == 1
        (only,) = document.values()
        return only

    def refused(self, status: int, *argv: str, env: Mapping[str, str] | None = None) -> str:
        """What a command says that has to end with this status."""
        done = self.run(*argv, env=env)
        assert done.returncode == status, (argv, done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done.stderr

    def spawn(self, *argv: str, fault: str = "", env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """A command left to itself; the fixture kills it if the test does not."""
        process = subprocess.Popen(
            self.command(argv),
            env={**os.environ, **self.environment, "HVCTL_FAULT": fault, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def kill(self, process: subprocess.Popen[str]) -> None:
        process.send_signal(signal.SIGKILL)
        process.communicate()

    # --- VMs

    def name(self) -> str:
        return f"{self.prefix}{next(_numbers)}"

    def guest(self, name: str) -> Guest:
        return Guest(name, connection.uuid(name))

    def create(self, *options: str) -> Guest:
        """A new VM with a NIC on the site's bridge; with --start it has booted."""
        name = self.name()
        self.ok("vm", "create", name, "--image", "micro", "--nic", self.bridge, *options)
        guest = self.guest(name)
        if "--start" in options:
            guest.await_boot()
        return guest

    def show(self, guest: Guest) -> Any:
        return self.json("vm", "show", guest.name)

    @contextmanager
    def created(self, *options: str) -> Iterator[Guest]:
        """A VM that is gone after it."""
        guest = self.create(*options)
        try:
            yield guest
        finally:
            self.ok("vm", "delete", guest.name, "--force")

    # --- what is left

    def journal(self, query: str, *values: object) -> list[Any]:
        """Rows of the database itself."""
        path = Path(self.settings.state_dir, "hvctl.db")
        if not path.exists():
            return []
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            return [row[0] if len(row) == 1 else row for row in database.execute(query, values)]

    def open_rows(self) -> list[int]:
        return self.journal("select id from operation where state = 'open'")

    def inventory(self) -> dict[str, Any]:
        """Everything on the host that belongs to this site now, apart from the journal's closed rows."""
        here = list(domains(self.prefix))
        running = [g for g in here if g.state in ("running", "paused")]
        ours = self.journal("select distinct vm_uuid from operation")
        locks = list(self.settings.locks_dir.glob("*.lock"))
        return {
            "domains": {g.name: g.state for g in here},
            "folders": _entries(self.settings.vms_dir),
            "overlays": sorted(str(p) for p in self.settings.vms_dir.glob("*/*.qcow2*")),
            "snapshots": _entries(self.settings.snapshots_dir, "*/*"),
            "nodes": {g.name: g.nodes() for g in running},
            "tags": {g.name: g.tags() for g in running},
            "stored tags": {g.name: g.stored_tags() for g in here if g not in running},
            "taps": sorted(p.name for p in Path(f"/sys/class/net/{self.bridge}/brif").iterdir()),
            "shaped": {g.name: g.rates() for g in running if g.xml().find("devices/interface") is not None},
            "ifbs": sorted(i for uuid in ours for i in ifbs(uuid)),
            "locks": sorted(p.name for p in locks if not free(self.settings.locks_dir, p.stem)),
            "open": self.open_rows(),
            "processes": [p.pid for p in self.started if alive(p.pid)],
        }

    def remove_all(self) -> None:
        """After a test that failed half-way, so that it fails alone."""
        for process in self.started:
            self.kill(process)
        for guest in list(domains(self.prefix)):
            if guest.state != "shut off":
                virsh("destroy", guest.uuid)
            virsh("undefine", guest.uuid)
            for device in ifbs(guest.uuid):
                subprocess.run(["ip", "link", "del", device], check=True)


def _entries(folder: Path, pattern: str = "*") -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.glob(pattern))


@contextmanager
def real_site() -> Iterator[Site]:
    """Its folders go at the end with everything in them; what a test forgot there was seen before."""
    with ExitStack() as made:
        state, run, ram = (_folder(made, parent) for parent in ("/var/tmp", "/run", "/dev/shm"))
        site = Site(Settings(state_dir=state, run_dir=run, ram_dir=ram), f"hve{os.getpid()}", f"e2e-{os.getpid()}-")
        subprocess.run(["ip", "link", "add", site.bridge, "type", "bridge"], check=True)
        made.callback(subprocess.run, ["ip", "link", "del", site.bridge], check=True)
        subprocess.run(["ip", "link", "set", site.bridge, "up"], check=True)
        copy_image(site.settings, "micro")
        # The probe boots a guest: its answer holds for a copy of the image.
        known = kvmprobe.answer_file(Settings())
        if known.exists():
            shutil.copy(known, kvmprobe.answer_file(site.settings))
        made.callback(site.remove_all)
        yield site


def _folder(made: ExitStack, parent: str) -> str:
    folder = Path(tempfile.mkdtemp(prefix="hvctl-e2e-", dir=parent))
    made.callback(shutil.rmtree, folder)
    folder.chmod(0o711)  # QEMU, another user, passes through
    return str(folder)


def copy_image(settings: Settings, name: str) -> None:
    """A copy of a built image, whose manifest names the copy's place: an image is only taken for one where it lies."""
    source = Path(imagestore.find(Settings(), name).kernel).parent
    settings.images_dir.mkdir(mode=0o711, exist_ok=True)
    copy = settings.images_dir / source.name
    shutil.copytree(source, copy, copy_function=shutil.copyfile)
    manifest = copy / imagestore.MANIFEST
    manifest.write_text(manifest.read_text().replace(str(source), str(copy)))
    for file in copy.iterdir():
        file.chmod(0o444)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """How a spawned command ended: status and stderr."""
    _, stderr = process.communicate(timeout=SECONDS)
    return process.returncode, stderr


def await_stopped(process: subprocess.Popen[str]) -> None:
    """Until it reached its fault point: HVCTL_FAULT=…=stop stops it there."""

    def stopped() -> bool:
        assert alive(process.pid), ended(process)
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    await_true(stopped, "hvctl reaches its fault point")
