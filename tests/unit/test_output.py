"""Where standard output takes nothing, the exit status and stderr still tell what became of a command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults.command import FakeSite

from hvctl.adapters.fake.state import Exec
from hvctl.errors import Exit


def to(output: int, site: FakeSite, *argv: str) -> tuple[int, str]:
    """The status and stderr of a real process whose standard output is that."""
    done = subprocess.run(
        [sys.executable, "-m", "hvctl", *argv], env={**os.environ, **site.environment}, cwd=Path(__file__).parents[2],
        stdout=output, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.fixture
def a(site: FakeSite) -> FakeSite:
    site.world.add_vm("a", disks=())
    return site


@pytest.mark.parametrize("form", ["table", "json"])
def test_a_change_whose_result_cannot_be_written_is_told_by_its_operation(a: FakeSite, form: str) -> None:
    with Path("/dev/full").open("w") as full:
        status, err = to(full.fileno(), a, "-f", form, "allocate", "a", "--cpu-quota", "50%")
    assert (status, a.world.vm("a").allocation.cpu_quota) == (Exit.OUTPUT_LOST, 50)
    assert err == (
        "hvctl: allocate a: done, operation 1, but the output could not be written: No space left on device.\n"
        "  hint: hvctl operation show 1\n"
    )


def test_what_failed_keeps_its_status(a: FakeSite) -> None:
    a.world.set_libvirt_down(True)
    with Path("/dev/full").open("w") as full:
        status, err = to(full.fileno(), a, "vm", "list")
        assert (status, "the output" in err) == (Exit.UNREACHABLE, False)
        a.world.set_libvirt_down(False)
        status, err = to(full.fileno(), a, "vm", "list")
    assert (status, "the output could not be written: No space" in err) == (Exit.OUTPUT_LOST, True)


def test_a_reader_that_has_gone_is_no_failure(a: FakeSite) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        assert to(write, a, "allocate", "a", "--cpu-quota", "50%") == (Exit.DONE, "")
        assert to(write, a, "--help") == (Exit.DONE, "")
        a.world.set_behaviour("a", exec={"fails": Exec(3, "said")})
        assert to(write, a, "vm", "exec", "a", "--", "fails") == (3, "")
    finally:
        os.close(write)
    assert a.world.vm("a").allocation.cpu_quota == 50
