"""A VM whose RAM is in several pieces: NUMA cells, and a module that was plugged into the running guest by virsh."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.copies import PAGE, copies, page_with, ram_files
from host.foreign import foreign
from host.loaded import Loaded
from host.outside import MIB, Guest, virsh
from host.site import Site

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]

ROOM = "<maxMemory slots='2' unit='MiB'>1024</maxMemory>"
CELLS = """<cpu><numa>
  <cell id='0' cpus='0-1' memory='192' unit='MiB'/><cell id='1' memory='64' unit='MiB'/>
</numa></cpu>"""
MODULE = "<memory model='dimm'><target><size unit='MiB'>128</size><node>1</node></target></memory>"
OWN = 2 * MIB
# Memory of node 1 is taken from the module first if it is of the movable zone, and a page of 2 MiB is one piece.
PLACE = """
for block in /sys/devices/system/memory/memory*; do
  grep -q offline $block/state && echo online_movable > $block/state
done
mkdir -p /own
mount -t tmpfs -o huge=always,size=4m,mpol=bind:1 own /own
awk 'BEGIN { for (i = 0; i < 512; i++) printf "own-%04d %4087s", i, "" }' > /own/arena
"""


@pytest.fixture
def nothing_left(site: Site) -> Iterator[None]:
    before = site.inventory()
    yield
    assert site.inventory() == before


@pytest.fixture
def guest(site: Site, tmp_path: Path) -> Iterator[Guest]:
    """A running VM of two cells with empty slots for modules, adopted."""
    with foreign(site) as made:
        xml = virsh("dumpxml", made.uuid, "--inactive")
        xml = xml.replace("  <memory ", f"  {ROOM}\n  <memory ", 1).replace("<features>", f"{CELLS}<features>", 1)
        virsh("define", "/dev/stdin", stdin=xml)
        site.ok("vm", "adopt", made.name, "--yes")
        site.ok("vm", "start", made.name)
        made.await_boot()
        yield made
        site.ok("vm", "stop", made.name, "--force")


def mark(guest: Guest, word: str) -> None:
    where = "for f in /run/mark /data/mark; do echo WORD > $f; done; sync; echo WORD | dd of=/own/arena conv=notrunc"
    guest.run(f"{{ {where.replace('WORD', word)}; }} 2> /dev/null")


def marks(guest: Guest) -> list[str]:
    """RAM of the board, the disk, and the module."""
    return guest.run("sync; cat /run/mark /data/mark; head -n 1 /own/arena").split()


def test_a_plugged_module_goes_back_with_the_rest_and_in_part(
    site: Site, command: Loaded, guest: Guest, tmp_path: Path
) -> None:
    command.ok("snapshot", "take", guest.name, "without")
    (tmp_path / "module.xml").write_text(MODULE)
    virsh("attach-device", guest.uuid, str(tmp_path / "module.xml"), "--live")
    done = command.run("reset", guest.name, "--to", "without")
    assert (done.returncode, "dimm0" in done.stderr, "is new" in done.stderr) == (5, True, True), done.stderr
    command.ok("snapshot", "delete", guest.name, "without")

    guest.run(PLACE)
    ram = {file.name: file for file in ram_files(guest.pid)}
    assert set(ram) == {"ram-node0", "ram-node1", "dimm0"}
    (module,) = (m["data"] for m in guest.qmp("query-memory-devices"))
    base = int(module["addr"]) + page_with(ram["dimm0"], b"own-0000 ")
    assert int(module["addr"]) + page_with(ram["dimm0"], b"own-0511 ") == base + OWN - PAGE
    total, memory = guest.mem_total(), guest.memory()
    mark(guest, "old")
    with tempfile.TemporaryDirectory(dir=site.settings.ram_dir) as folder:
        virsh("suspend", guest.uuid)
        command.ok("snapshot", "take", guest.name, "s", "--own", f"{base:#x}-{base + OWN:#x}")
        kept = copies(guest, Path(folder))
        virsh("resume", guest.uuid)
        shown = command.json("snapshot", "show", guest.name, "s")
        assert {(Path(r["path"]).name, r["size"]) for r in shown["regions"]} == {
            ("ram-node0", 192 * MIB), ("ram-node1", 64 * MIB), ("dimm0", 128 * MIB)
        }  # fmt: skip

        for tracker in ("auto", "compare"):
            mark(guest, "new")
            virsh("suspend", guest.uuid)
            assert {"ram-node0", "dimm0", guest.overlays()[0].name} <= set(kept.unequal())
            done = command.json("reset", guest.name, "--to", "s", "--tracker", tracker, "--audit")
            assert done["result"]["tracker"] == ("uffd" if tracker == "auto" else "compare")
            assert kept.unequal() == {}
            virsh("resume", guest.uuid)
            guest.await_answer()
            assert marks(guest) == ["old"] * 3
            assert (guest.mem_total(), guest.memory()) == (total, memory)

    # Running, too, it keeps what was plugged, which is more than was promised.
    assert command.json("reset", guest.name, "--to", "s")["warnings"] == []
    guest.await_answer()
    assert (guest.mem_total(), guest.memory()) == (total, memory)

    mark(guest, "new")
    command.ok("reset", guest.name, "--to", "s", "--only", f"ram:{base:#x}-{base + OWN:#x}")
    guest.await_answer()
    assert marks(guest) == ["new", "new", "old"]
    beyond = f"ram:{module['addr'] + module['size'] - PAGE:#x}-{module['addr'] + module['size'] + PAGE:#x}"
    done = command.run("reset", guest.name, "--to", "s", "--only", beyond, "--accept-incoherent")
    assert (done.returncode, "no RAM at" in done.stderr) == (5, True), done.stderr
    assert (guest.state, marks(guest)) == ("running", ["new", "new", "old"])
    command.ok("snapshot", "delete", guest.name, "s")
    assert (guest.nodes(), guest.tags()) == ([], [])
