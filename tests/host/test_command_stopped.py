"""allocate where no guest answers: on a VM that is off, and on a running domain of somebody else."""

from __future__ import annotations

import pytest

from host.foreign import foreign
from host.outside import MIB, ifbs, virsh
from host.site import Site
from host.test_command_allocate import promised, tuned

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]


def test_what_a_vm_that_is_off_was_given_holds_from_its_start_on(site: Site) -> None:
    with site.created() as guest:
        site.ok(
            *("allocate", guest.name, "--vcpus", "2", "--memory", "320MiB", "--cpu-quota", "120%"),
            *("--cpu-weight", "300", "--iops", "400", "--net-in", "8Mbit", "--net-out", "16Mbit"),
        )
        assert (guest.vcpus("--current", "--config"), guest.memory("--config")) == (2, 320 * MIB)
        tuning = guest.stats("blkdeviotune", "vda", "--config")
        assert tuning["total_iops_sec"] == "400"
        assert promised(guest)["nics"][0]["outbound"] == 16_000_000  # type: ignore[index]
        # Somebody meddles with the definition: what was promised is what counts.
        virsh("setvcpus", guest.uuid, "1", "--config")
        site.ok("vm", "start", guest.name)
        guest.await_boot()
        assert (guest.online(), guest.memory(), guest.cpu()) == (2, 320 * MIB, (300, 120))
        assert guest.rates() == {"in": 8_000_000, "out": 16_000_000}
        assert tuned(guest) == {"total_iops_sec": 400}
        site.ok("vm", "stop", guest.name)
        assert ifbs(guest.uuid) == []


def test_a_running_domain_of_somebody_else(site: Site) -> None:
    with foreign(site, boots=False) as guest:
        virsh("start", guest.uuid)
        (row,) = (r for r in site.json("vm", "list") if r["name"] == guest.name)
        assert (row["state"], row["managed"], row["warm"]) == ("running", False, False)
        command = ("allocate", guest.name, "--cpu-quota", "40%", "--cpu-weight", "50", "--iops", "300")
        site.ok(*command, "--net-out", "8Mbit", "--dry-run")
        assert (guest.cpu(), guest.rates()) == ((100, None), {})
        site.ok(*command, "--net-out", "8Mbit")
        assert (guest.cpu(), guest.rates(), tuned(guest)) == ((50, 40), {"out": 8_000_000}, {"total_iops_sec": 300})
        assert promised(guest)["cpu_quota"] == 40
        assert "do not lose" in virsh("dumpxml", guest.uuid, "--inactive")
        site.ok("allocate", guest.name, "--net-out", "none")
        assert "did not create" in site.refused(5, "vm", "delete", guest.name, "--force")
        site.ok("vm", "stop", guest.name, "--force")


def test_a_guest_without_a_balloon_driver_gives_nothing(site: Site) -> None:
    """Refused without statistics; forced, it is tried and undone; with best effort the nothing is kept."""
    with foreign(site, boots=False) as guest:
        virsh("start", guest.uuid)
        shrink = ("allocate", guest.name, "--memory", "128MiB")
        assert "no memory statistics" in site.refused(5, *shrink)
        said = site.refused(8, *shrink, "--force")
        assert "stopped at 256 MiB" in said
        assert (guest.memory(), guest.memory("--config")) == (256 * MIB, 256 * MIB)
        partial = site.run(*shrink, "--force", "--best-effort")
        assert partial.returncode == 0, partial.stderr
        assert "gave only down to 256 MiB" in partial.stderr
        assert guest.memory() == 256 * MIB
