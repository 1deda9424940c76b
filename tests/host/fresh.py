"""The oracle of resets: the same moment of a guest in a QEMU process of its own, by QEMU's ordinary incoming migration.

Nothing of hvctl takes part: the stream is QEMU's, RAM and disks are plain copies, the process is started by hand.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from host.outside import Guest, await_true
from host.worker import Worker, console

# What a process by hand has not: monitors and descriptors that libvirt opened, its sandbox, its log.
_DROPPED = {"-sandbox", "-msg", "-name"}


def saved_stream(guest: Guest, path: Path) -> Path:
    """QEMU's migration stream of the paused guest without its RAM, as it is now. The guest stays paused and whole."""
    address = path.with_suffix(".sock")
    with socket.socket(socket.AF_UNIX) as server, path.open("wb") as stream:
        server.bind(str(address))
        shutil.chown(address, "libvirt-qemu")
        server.listen(1)
        server.settimeout(30)
        _capability(guest.qmp, True)
        try:
            guest.qmp("migrate", uri=f"unix:{address}")
            peer, _ = server.accept()
            with peer:
                while data := peer.recv(1 << 20):
                    stream.write(data)
            await_true(lambda: guest.qmp("query-migrate")["status"] == "completed", "QEMU has written its stream")
        finally:
            _capability(guest.qmp, False)
            address.unlink()
    return path


def _capability(qmp: Any, on: bool) -> None:
    qmp("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": on}])


@contextmanager
def fresh_qemu(guest: Guest, ram: Path, disks: dict[str, Path], stream: Path, folder: Path) -> Iterator[Worker]:
    """A process with copies of everything, which has come in and runs; its console speaks with the worker."""
    own = folder / "fresh"
    own.mkdir()
    memory = own / "ram"
    subprocess.run(["cp", "--sparse=always", ram, memory], check=True)
    copies = {path: own / f"{n}.qcow2" for n, path in enumerate(disks)}
    for path, copy in copies.items():
        shutil.copyfile(disks[path], copy)
    arguments = Path(f"/proc/{guest.pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    monitor = own / "qmp"
    with (own / "log").open("wb") as log:
        process = subprocess.Popen(
            [*_by_hand(arguments, memory, copies, own), "-qmp", f"unix:{monitor},server=on,wait=off"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        await_true(lambda: _answers(process, monitor, own / "log"), "the fresh QEMU answers")
        with _Monitor(monitor) as qmp:
            _plug_vcpus(guest, qmp)
            _capability(qmp.execute, True)
            qmp.execute("migrate-incoming", uri=f"exec:cat {stream}")
            await_true(lambda: _came_in(process, qmp, own / "log"), "the stream has come in")
            (pty,) = [c["filename"] for c in qmp.execute("query-chardev") if c["filename"].startswith("pty:")]
            with console(pty.removeprefix("pty:")) as worker:
                qmp.execute("cont")
                yield worker
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(own)


def _plug_vcpus(guest: Guest, qmp: _Monitor) -> None:
    """Those that libvirt plugs before it lets a guest run stand on no command line."""
    there = {str(slot["props"]) for slot in qmp.execute("query-hotpluggable-cpus") if "qom-path" in slot}
    for slot in guest.qmp("query-hotpluggable-cpus"):
        if "qom-path" in slot and str(slot["props"]) not in there:
            name = slot["qom-path"].rpartition("/")[2]
            qmp.execute("device_add", driver=slot["type"], id=name, **slot["props"])


def _came_in(process: subprocess.Popen[bytes], qmp: _Monitor, log: Path) -> bool:
    try:
        return bool(qmp.execute("query-migrate").get("status") == "completed")
    except OSError:
        process.wait(10)
        raise AssertionError(f"the fresh QEMU ended with {process.returncode}: {log.read_text()}") from None


def _answers(process: subprocess.Popen[bytes], monitor: Path, log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    with socket.socket(socket.AF_UNIX) as probe:
        with contextlib.suppress(OSError):
            probe.connect(str(monitor))
            return True
    return False


def _by_hand(arguments: list[str], memory: Path, disks: dict[str, Path], own: Path) -> list[str]:
    """libvirt's command line, with the copies in the place of what it names."""
    made = [arguments[0]]
    words = iter(arguments[1:])
    for option in words:
        if option in ("-S", "-no-user-config", "-nodefaults", "-no-acpi", "-no-hpet", "-no-shutdown", "-enable-kvm"):
            made.append(option)
            continue
        value = next(words)
        if option in _DROPPED or "charmonitor" in value or ("hvctl," in f"{value}," and option in ("-chardev", "-mon")):
            continue
        if option == "-object" and "memory-backend" in value:
            value = re.sub(r'"mem-path":"[^"]*"', f'"mem-path":"{memory}"', value)
        elif option == "-blockdev":
            for path, copy in disks.items():
                value = value.replace(json.dumps(path), json.dumps(str(copy)))
        elif option == "-netdev":
            identity = json.loads(value)["id"] if value.startswith("{") else re.search(r"id=([^,]+)", value)[1]  # type: ignore[index]
            # A tap of its own that leads nowhere: the state of a network card holds what kind of peer it has.
            value = f"tap,id={identity},ifname=hvf{os.getpid()},script=no,downscript=no,vnet_hdr=on"
        elif option == "-chardev" and ("fd=" in value or "socket" in value):
            identity = re.search(r"id=([^,]+)", value)[1]  # type: ignore[index]
            value = f"null,id={identity}"
        elif option == "-chardev" and value.startswith("pipe"):
            identity = re.search(r"id=([^,]+)", value)[1]  # type: ignore[index]
            pipe = own / "pulse"
            for end in (".in", ".out"):
                os.mkfifo(f"{pipe}{end}", 0o600)
            value = f"pipe,id={identity},path={pipe}"
        made += [option, value]
    return [*made, "-incoming", "defer"]


class _Monitor:
    """The least of a QMP client: nothing of hvctl's is asked here."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(str(path))
        self._stream = self._socket.makefile("rb")

    def __enter__(self) -> _Monitor:
        self._stream.readline()
        self.execute("qmp_capabilities")
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._socket.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self._stream.readline())
            assert "error" not in answer, (command, answer)
            if "return" in answer:
                return answer["return"]
