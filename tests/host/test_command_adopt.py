"""vm adopt on a domain that somebody defined with virsh: shown, applied in place, and warm from its next start on."""

from __future__ import annotations

import pytest

from host.foreign import foreign
from host.outside import virsh
from host.site import Site

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]


def test_a_foreign_domain_becomes_ready_for_warm_resets(site: Site) -> None:
    with foreign(site) as guest:
        definition = virsh("dumpxml", guest.uuid, "--inactive")
        virsh("start", guest.uuid)
        running = guest.pid

        shown = site.run("vm", "adopt", guest.name, "--exit-code")
        assert shown.returncode == 10
        for line in ("+++ for warm resets", "+  <memoryBacking>", "org.qemu.guest_agent.0", "qmp/monitor.sock"):
            assert line in shown.stdout
        assert virsh("dumpxml", guest.uuid, "--inactive") == definition
        assert "adopt" in site.refused(5, "snapshot", "take", guest.name)

        site.ok("vm", "adopt", guest.name, "--yes")
        adopted = guest.xml(inactive=True)
        assert [e.get("type") for e in adopted.iterfind("memoryBacking/source")] == ["file"]
        assert adopted.findtext("title") == "Somebody's own"
        assert adopted.findtext("metadata/{urn:somebody}note") == "do not lose"
        assert (guest.pid, guest.xml().find("memoryBacking")) == (running, None)
        assert "nothing to do" in site.ok("vm", "adopt", guest.name, "--yes", "--exit-code")

        virsh("destroy", guest.uuid)
        virsh("start", guest.uuid)
        guest.await_boot()
        (row,) = (r for r in site.json("vm", "list") if r["name"] == guest.name)
        assert (row["warm"], row["managed"]) == (True, True)
        pid = guest.pid
        guest.mark("before")
        site.ok("snapshot", "take", guest.name, "s")
        guest.mark("after")
        site.ok("reset", guest.name, "--to", "s")
        guest.await_answer()  # libvirt has the channel of its agent for closed right after a reset
        assert (guest.marks(), guest.pid) == (("before", "before"), pid)
        site.ok("snapshot", "delete", guest.name, "s")
        site.ok("vm", "stop", guest.name)


def test_a_transient_domain_has_no_definition_to_adopt(site: Site) -> None:
    with foreign(site, boots=False) as guest:
        virsh("start", guest.uuid)
        definition = virsh("dumpxml", guest.uuid, "--inactive")
        virsh("undefine", guest.uuid)
        try:
            assert "is transient" in site.refused(5, "vm", "adopt", guest.name, "--yes")
        finally:
            virsh("define", "/dev/stdin", stdin=definition)
