"""doctor: what others changed behind hvctl's back is reported, and mended by --fix; what is not hvctl's is left."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace

import pytest

from host.foreign import foreign
from host.outside import MIB, Guest, await_true, ifbs, virsh
from host.site import Site
from hvctl.decide.drift import Mend
from hvctl.engine.operate import Engine
from hvctl.engine.runtime import open_engine
from hvctl.operations import doctor
from hvctl.operations import snapshot as snapshots
from hvctl.operations import vm as vms

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]


def drift(site: Site, guest: Guest, *options: str) -> list[str]:
    """What doctor says of one VM; other VMs of this host are none of this test's business."""
    said = site.run("-f", "json", "doctor", "--probe", "drift", *options)
    assert said.returncode == 0, said.stderr
    findings = json.loads(said.stdout)["findings"]
    return [f["detail"] for f in findings if f["name"] in (f"drift:{guest.name}", f"drift:{guest.uuid}")]


def tc(*argv: str) -> str:
    return subprocess.run(["tc", *argv], check=True, capture_output=True, text=True).stdout


def test_a_new_vm_has_no_drift(site: Site, vm: Guest) -> None:
    assert drift(site, vm) == []
    assert vm.name not in site.ok("doctor", "--probe", "drift")


def test_what_others_changed_is_mended(site: Site, vm: Guest) -> None:
    site.ok("allocate", vm.name, "--iops", "500", "--net-in", "8Mbit", "--net-out", "4Mbit", "--cpu-quota", "80%")
    virsh("setmem", vm.uuid, "300MiB", "--live")
    virsh("blkdeviotune", vm.uuid, "vda", "--total-iops-sec", "9", "--live")
    virsh("schedinfo", vm.uuid, "--live", "--set", "global_quota=-1")
    tc("qdisc", "del", "dev", vm.tap, "root")
    await_true(lambda: vm.memory() == 300 * MIB, "the balloon moved")
    (said,) = drift(site, vm)
    for part in ("memory 256 MiB, is 300 MiB", "cpu_quota 80, is None", "net_in", "iops=9"):
        assert part in said
    assert (vm.memory(), vm.rates()) == (300 * MIB, {"out": 4_000_000})

    assert drift(site, vm, "--fix") == []
    assert (vm.memory(), vm.cpu()) == (256 * MIB, (100, 80))
    assert vm.rates() == {"in": 8_000_000, "out": 4_000_000}
    assert vm.stats("blkdeviotune", "vda")["total_iops_sec"] == "500"
    site.ok(
        *("allocate", vm.name, "--iops", "none", "--net-in", "none", "--net-out", "none", "--cpu-quota", "none"),
    )


def test_a_qdisc_of_somebody_else_is_reported_and_left(site: Site, vm: Guest) -> None:
    tc("qdisc", "replace", "dev", vm.tap, "root", "handle", "77:", "htb")
    try:
        for options in ((), ("--fix",)):
            (said,) = drift(site, vm, *options)
            assert "htb 77:" in said
        assert "qdisc htb 77:" in tc("qdisc", "show", "dev", vm.tap)
    finally:
        tc("qdisc", "del", "dev", vm.tap, "root")
    assert drift(site, vm) == []


def test_a_lost_record_comes_back(site: Site, vm: Guest) -> None:
    (record,) = (e for e in vm.xml(inactive=True).iterfind("metadata/*") if "hvctl" in e.tag)
    namespace = record.tag[1:].partition("}")[0]
    for flag in ("--live", "--config"):
        virsh("metadata", vm.uuid, namespace, "--remove", flag)
    assert any("lost what the database promised" in text for text in drift(site, vm))
    assert drift(site, vm, "--fix") == []
    assert site.show(vm)["image"] == "micro"


def test_what_belongs_to_a_vm_that_is_gone_goes(site: Site) -> None:
    """Somebody undefined it: its promise and its devices go, its folder is shown to a person."""
    with foreign(site, boots=False) as guest:
        virsh("start", guest.uuid)
        site.ok("allocate", guest.name, "--net-in", "8Mbit")
        virsh("destroy", guest.uuid)
        assert any("VM that is off" in text for text in drift(site, guest))
        assert ifbs(guest.uuid) != []
    folder = site.settings.vms_dir / guest.uuid
    folder.mkdir(parents=True)
    said = drift(site, guest)
    assert any("libvirt does not list it" in text for text in said)
    (left,) = drift(site, guest, "--fix")
    assert "state folder" in left
    assert ifbs(guest.uuid) == []
    shutil.rmtree(folder)
    assert drift(site, guest) == []


def test_tags_of_snapshots_that_went_with_the_host_are_removed(site: Site, vm: Guest) -> None:
    """Their folders are on a tmpfs, their tags in the disks are not: removed in a QEMU that runs, and in files."""
    (overlay,) = vm.overlays()
    kept_in = site.settings.snapshots_dir / vm.uuid

    def checked(engine: Engine, count: int) -> None:
        found = [d for d in doctor.look(engine) if d.vm_uuid == vm.uuid and d.mend is Mend.DROP_TAGS]
        assert [d.detail.split(" whose RAM is gone")[0] for d in found] == [f"{count} snapshots"]
        doctor.fix(engine, found, pytest.fail)
        assert Mend.DROP_TAGS not in {d.mend for d in doctor.look(engine) if d.vm_uuid == vm.uuid}

    with open_engine(replace(site.settings, cpu_overcommit=1000.0, memory_overcommit=1000.0)) as engine:
        for name in ("one", "two"):
            vm.run("dd if=/dev/urandom of=/data/work bs=64k count=48; sync")
            snapshots.take(engine, vm.name, name)
        assert Mend.DROP_TAGS not in {d.mend for d in doctor.look(engine)}
        virsh("destroy", vm.uuid)
        shutil.rmtree(kept_in)
        vms.start(engine, vm.name)
        kept = snapshots.take(engine, vm.name, "kept")
        assert (kept.state, len(vm.tags())) == ("done", 3)
        checked(engine, 2)
        assert len(vm.tags()) == 1

        virsh("destroy", vm.uuid)
        shutil.rmtree(kept_in)
        size = overlay.stat().st_blocks
        assert len(vm.stored_tags()) == 1
        checked(engine, 1)
        assert vm.stored_tags() == []
        assert overlay.stat().st_blocks <= size
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(overlay)], check=True)
        vms.start(engine, vm.name)
