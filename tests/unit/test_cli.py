"""What the command line prints and how it exits, on a fake host.

`UPDATE_GOLDEN=1 pytest tests/unit/test_cli.py` writes what is printed now into tests/golden: read the diff after it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from faults.command import FakeSite

from hvctl.cli import complete
from hvctl.cli.render import laid_out
from hvctl.errors import Exit
from hvctl.model.allocation import Allocation, Record
from unit.commandline import Run, runner
from unit.enginehost import MIB, add_image

GOLDEN = Path(__file__).parent.parent / "golden"
WEB = "11111111-2222-3333-4444-555555555555"
DB = "22222222-2222-3333-4444-555555555555"
MASKS = (
    (r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}", "UUID"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "TIME"),
    (r"\b\d+\.\d+ (ms|s)\b", "DURATION"),
    (r"(\"?seconds\"?: )\d[\d.e-]*", r"\1DURATION"),
    (r"\"\"seconds\"\": [\d.e-]+", '""seconds"": DURATION'),
)


@pytest.fixture
def run(site: FakeSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(site, monkeypatch, capsys)


@pytest.fixture
def hosted(site: FakeSite) -> FakeSite:
    """A VM of hvctl's with a label and one that somebody else made."""
    record = Record(Allocation(2, 256 * MIB), image="micro", labels={"team": "ci"})
    site.world.add_vm("web", uuid=WEB, vcpus=2, record=record)
    site.world.add_vm("db", uuid=DB, running=False, memory=512 * MIB, missing=("shared RAM", "a second monitor"))
    return site


def golden(name: str, text: str) -> None:
    for pattern, mask in MASKS:
        text = re.sub(pattern, mask, text)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_bytes(text.encode())
    assert text == path.read_bytes().decode()


LINES: dict[str, tuple[str, ...]] = {
    "vm-list": ("vm", "list"),
    "vm-show": ("vm", "show", "web"),
    "vm-show-foreign": ("vm", "show", "db"),
    "dry-run": ("allocate", "web", "--vcpus", "1", "--memory", "512MiB", "--net-in", "20Mbit", "--dry-run", "--diff"),
    "nothing-to-do": ("allocate", "web", "--vcpus", "2", "--dry-run"),
    "error-not-found": ("vm", "show", "nobody"),
    "error-unit": ("allocate", "web", "--memory", "512"),
    "error-does-not-fit": ("allocate", "web", "--vcpus", "9"),
}


@pytest.mark.parametrize("form", ["table", "json", "yaml", "csv"])
@pytest.mark.parametrize("name", LINES)
def test_what_is_printed(run: Run, hosted: FakeSite, name: str, form: str) -> None:
    ran = run("-f", form, *LINES[name])
    golden(f"cli-{name}-{form}", f"{ran.out}--- stderr\n{ran.err}--- exit {ran.status}\n")
    if ran.status:
        assert ran.out == ""
        assert re.fullmatch(r"hvctl: .+\n  hint: .+\n", ran.err)
    elif form in ("json", "yaml"):
        document = json.loads(ran.out) if form == "json" else yaml.safe_load(ran.out)
        assert document["schema_version"] == 1


@pytest.mark.parametrize("form", ["table", "json"])
def test_an_outcome_and_the_journal(run: Run, hosted: FakeSite, form: str) -> None:
    done = run("-f", form, "allocate", "web", "--vcpus", "1", "--cpu-quota", "50%", "--diff")
    site_fails = hosted.world
    site_fails.fail("set_cpu_quota")
    failed = run("-f", form, "allocate", "web", "--cpu-quota", "70%")
    listed = run("-f", form, "operation", "list", "--vm", "web", "--state", "undone", "--limit", "5")
    shown = run("-f", form, "operation", "show", "1")
    assert (done.status, failed.status, listed.status, shown.status) == (0, Exit.UNDONE, 0, 0)
    golden(f"cli-outcome-{form}", done.out + failed.err + listed.out + shown.out)


def test_data_is_on_stdout_and_remarks_are_not(run: Run, hosted: FakeSite) -> None:
    spoken = run("-v", "-f", "json", "allocate", "web", "--cpu-quota", "50%")
    assert "set cpu quota 50%" in spoken.err
    assert json.loads(spoken.out)["operation"]["state"] == "done"
    quiet = run("--quiet", "-v", "allocate", "web", "--cpu-quota", "60%")
    assert quiet.err == ""


def test_a_table_that_a_terminal_would_break_apart_is_records() -> None:
    cells = [["PROBE", "SEEN", "LOST"], ["kvm", "x" * 40, "y" * 40], ["psi", "z" * 40, "-"]]
    table = list(laid_out(cells, None))
    assert table[0].split() == cells[0]
    assert list(laid_out(cells, 40)) == table, "a row of two lines can be read, however long its end is"
    records = list(laid_out(cells, 30))
    assert records == ["PROBE  kvm", f"SEEN   {'x' * 40}", f"LOST   {'y' * 40}", "", "PROBE  psi", f"SEEN   {'z' * 40}"]


def test_a_key_gives_the_first_answer(run: Run, hosted: FakeSite) -> None:
    first, again = (run("--key", "k", "-f", "json", "allocate", "web", "--cpu-quota", "50%") for _ in range(2))
    numbers = {json.loads(r.out)["operation"]["operation"] for r in (first, again)}
    assert len(numbers) == 1


def test_operations_of_a_vm_that_nobody_knows(run: Run, hosted: FakeSite) -> None:
    """A deleted VM is known by its operations, and one that has none yet by the host; a name with a slip is neither."""
    add_image(hosted)
    for argv in (("create", "gone", "--image", "micro"), ("delete", "gone")):
        assert run("vm", *argv).status == Exit.DONE
    (deleted, created) = json.loads(run("-f", "json", "operation", "list", "--vm", "gone").out)["operations"]
    assert (deleted["kind"], created["kind"]) == ("delete", "create")
    for known in (("gone", "--state", "failed"), (created["vm_uuid"], "--state", "failed"), ("db",), (DB,)):
        ran = run("-f", "json", "operation", "list", "--vm", *known)
        assert (ran.status, json.loads(ran.out)["operations"]) == (Exit.DONE, []), known
    for unknown in ("typo", WEB.replace("1", "9")):
        ran = run("operation", "list", "--vm", unknown)
        assert (ran.status, ran.out) == (Exit.NOT_FOUND, "")
        assert ran.err.startswith(f"hvctl: there is no VM '{unknown}', and no operation of one in the journal.\n")


def test_an_image_that_is_needed_names_the_vm_as_its_operator_does(run: Run, hosted: FakeSite) -> None:
    add_image(hosted)
    folder = hosted.settings.vms_dir / WEB
    folder.mkdir(parents=True)
    (folder / "image").symlink_to(next(hosted.settings.images_dir.iterdir()))
    ran = run("image", "delete", "micro")
    assert (ran.status, ran.err) == (
        Exit.REFUSED,
        "hvctl: the VM web boots from the image micro.\n  hint: delete the VM first: hvctl vm delete web\n",
    )
    hosted.world.set_libvirt_down(True)
    assert run("image", "delete", "micro").err.startswith(f"hvctl: the VM {WEB} boots from")
    hosted.world.set_libvirt_down(False)
    hosted.world.destroy("web")
    hosted.world.undefine("web")
    ran = run("image", "delete", "micro")
    assert (ran.status, f"left a folder that needs it: {WEB}" in ran.err) == (Exit.REFUSED, True)


def test_a_bridge_that_is_not_there_is_said_before_the_start(run: Run, hosted: FakeSite) -> None:
    """A VM may be made before its bridge is; it may not be started."""
    add_image(hosted)
    create = ("vm", "create", "new", "--image", "micro", "--nic", "br0", "--nic", "br9", "--nic", "br9")
    said = "warning: there is no bridge br9 yet, which new needs to start\n"
    for options in (("--start",), ("--start", "--dry-run")):
        ran = run(*create, *options)
        assert (ran.status, "new cannot start: the host has no bridge br9." in ran.err) == (Exit.REFUSED, True)
        assert "new" not in {vm.name for vm in hosted.world.read().vms.values()}
    assert (run(*create, "--dry-run").err, run(*create).err) == (said, said)
    assert json.loads(run("-f", "json", "operation", "show", "1").out)["operation"]["result"]["warnings"] == [
        said.removeprefix("warning: ").strip()
    ]
    run("vm", "delete", "new")
    hosted.world.add_bridge("br9")
    assert run(*create, "--start").err == ""


# --- exit statuses


def prepared(site: FakeSite, *failures: tuple[str, str]) -> None:
    for call, error in failures:
        site.world.fail(call, error)


STATUSES: dict[Exit, tuple[Callable[[FakeSite], None], tuple[str, ...]]] = {
    Exit.DONE: (lambda site: None, ("vm", "list")),
    Exit.FAILED: (
        lambda site: site.world.set_behaviour("web", answers={"guest-exec": "nonsense"}),
        ("vm", "exec", "web", "--timeout", "1", "--max-output", "1KiB", "--", "true"),
    ),
    Exit.USAGE: (lambda site: None, ("allocate", "web")),
    Exit.NOT_FOUND: (lambda site: None, ("snapshot", "show", "web", "s")),
    Exit.UNREACHABLE: (lambda site: site.world.set_libvirt_down(True), ("vm", "list")),
    Exit.REFUSED: (lambda site: None, ("allocate", "web", "--memory", "2GiB")),
    Exit.TIMEOUT: (lambda site: site.world.set_behaviour("web", agent="silent"), ("vm", "exec", "web", "--", "true")),
    Exit.BUSY: (lambda site: None, ("allocate", "web", "--cpu-quota", "50%")),
    Exit.UNDONE: (
        lambda site: site.world.set_behaviour("web", ignores_shutdown=True), ("vm", "stop", "web", "--seconds", "0.1")
    ),
    Exit.NOT_UNDONE: (
        lambda site: prepared(site, ("set_cpu_quota", "DeadlineError")), ("allocate", "web", "--cpu-quota", "50%")
    ),
    Exit.CHANGES_PENDING: (
        lambda site: None, ("allocate", "web", "--cpu-quota", "50%", "--dry-run", "--exit-code")
    ),
}  # fmt: skip


def test_every_status_has_its_case() -> None:
    """That of lost output, which needs a process of its own, has it in test_output."""
    assert set(STATUSES) == set(Exit) - {Exit.OUTPUT_LOST}


@pytest.mark.parametrize("status", list(STATUSES))
def test_exit_statuses(run: Run, hosted: FakeSite, monkeypatch: pytest.MonkeyPatch, status: Exit) -> None:
    from hvctl.engine.lock import vm_lock

    prepare, argv = STATUSES[status]
    prepare(hosted)
    if status is Exit.BUSY:
        monkeypatch.setenv("HVCTL_LOCK_WAIT", "0")
        with vm_lock(hosted.settings.locks_dir, WEB, 0):
            ran = run(*argv)
    else:
        ran = run(*argv)
    assert (ran.status, "Traceback" in ran.err) == (status, False), ran.err
    assert bool(ran.err) is (status not in (Exit.DONE, Exit.CHANGES_PENDING))


def test_ctrl_c_says_what_it_left(run: Run, hosted: FakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvctl.engine.execute import Execution

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Execution, "run", interrupted)
        ran = run("allocate", "web", "--cpu-quota", "50%")
    assert (ran.status, ran.out) == (130, "")
    assert ran.err.splitlines() == [
        "hvctl: allocate of web was interrupted: operation 1 stays open, and its guest may be paused.",
        "  hint: hvctl recover ends it",
    ]
    assert "undone" in run("recover").out


def test_a_foreign_exit_status_is_the_programs(run: Run, hosted: FakeSite) -> None:
    from hvctl.adapters.fake.state import Exec

    hosted.world.set_behaviour("web", exec={"sh -c x": Exec(42, "out\x1b[2J\n", "err\n")})
    ran = run("-f", "json", "vm", "exec", "web", "--", "sh", "-c", "x")
    assert ran.status == 42
    assert json.loads(ran.out)["exec"]["stdout"] == "out\x1b[2J\n"
    assert "\x1b" not in ran.out


def test_debug_shows_where_an_error_comes_from(run: Run, hosted: FakeSite) -> None:
    ran = run("--debug", "vm", "show", "nobody")
    assert (ran.status, "Traceback" in ran.err) == (Exit.NOT_FOUND, True)
    assert ran.err.splitlines()[-2].startswith("hvctl: there is no VM")
    assert "Traceback" not in run("vm", "exec", "nobody", "--", "gdb", "--debug").err


def test_long_names_of_the_root_flags(run: Run, hosted: FakeSite) -> None:
    ran = run("--format", "json", "--verbose", "vm", "protect", "web")
    assert json.loads(ran.out)["operation"]["kind"] == "protect"
    assert "set record" in ran.err
    assert run("--version").out.startswith("hvctl ")


def test_an_image_is_rebuilt_only_when_asked(run: Run, site: FakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvctl.adapters.images import imagebuild, imagestore

    add_image(site)
    image = imagestore.find(site.settings, "micro")
    asked: list[bool] = []
    monkeypatch.setattr(imagebuild, "cached", lambda *_: image)
    monkeypatch.setattr(imagebuild, "build", lambda *_, force: asked.append(force) or image)
    assert "is there" in run("image", "build", "micro", "--dry-run").err
    assert "would be built" in run("image", "build", "micro", "--rebuild", "--dry-run").err
    assert asked == []
    assert run("image", "build", "micro", "--rebuild").status == 0
    assert run("image", "build", "micro").status == 0
    assert asked == [True, False]


def test_the_host_is_changed_only_on_yes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvctl.adapters.node import hostprep

    left = [SimpleNamespace(name="folder /x", now="missing", wanted="0700", how="make it")]
    monkeypatch.setattr(hostprep, "changes", lambda _: tuple(left))
    monkeypatch.setattr(hostprep, "apply", lambda change: left.remove(change))
    shown = run("host", "prepare", "--exit-code")
    assert (shown.status, len(left)) == (Exit.CHANGES_PENDING, 1)
    assert "folder /x" in shown.out
    assert run("host", "prepare", "--yes", "--exit-code").status == 0
    assert left == []
    assert "nothing to change" in run("host", "prepare", "--yes").err


# --- the rest of a life, and completion


def test_a_whole_life(run: Run, site: FakeSite) -> None:
    add_image(site)
    create = ("vm", "create", "new", "--image", "micro", "--vcpus", "2", "--max-vcpus", "3", "--memory", "128MiB")
    create += ("--max-memory", "512MiB", "--disk", "data:64MiB", "--nic", "br0", "--label", "team=ci", "--start")
    limits = ("--net-out", "1Mbit", "--nic", "hv0", "--iops", "100", "--iops-burst", "200", "--burst-seconds", "5")
    limits += ("--disk-rate", "1MiB", "--disk-burst", "2MiB", "--disk", "data", "--cpu-weight", "50")
    assert run(*create, "--dry-run", "--exit-code").status == Exit.CHANGES_PENDING
    assert run(*create).status == 0
    tap = site.world.vm("new").nics[0].tap or ""
    limits = tuple(tap if word == "hv0" else word for word in limits)
    assert run("allocate", "new", *limits, "--force", "--best-effort").status == 0
    assert site.world.vm("new").allocation.disks[0].iops_burst == 200
    assert "would do (protected from now on)" in run("vm", "protect", "new", "--dry-run").out
    assert run("vm", "protect", "new").status == 0
    assert run("vm", "delete", "new", "--force").status == Exit.REFUSED
    assert run("vm", "protect", "new", "--off").status == 0
    assert run("snapshot", "take", "new", "s").status == 0
    assert "ready" in run("snapshot", "list", "new").out
    assert run("snapshot", "show", "new", "s").status == 0
    assert run("reset", "new", "--to", "s").status == 0
    assert run("snapshot", "delete", "new", "s").status == 0
    assert run("vm", "stop", "new", "--force").status == 0
    assert run("vm", "start", "new").status == 0
    assert run("recover").status == 0
    assert run("doctor", "--probe", "drift", "--fix").status == 0
    assert run("vm", "delete", "new", "--force").status == 0
    assert site.world.read().vms == {}


def test_a_pool_and_who_goes_for_whom(run: Run, site: FakeSite) -> None:
    """Every option of it, on a host that is full but for 1 GiB."""
    for name in ("spot", "other"):
        site.world.add_vm(name, memory=512 << 20, nics=0, disks=())
    choose = ("vm", "set", "spot", "--priority", "100", "--interruptible")
    would = run(*choose, "--dry-run", "--exit-code")
    assert would.status == Exit.CHANGES_PENDING
    assert would.out.startswith("set spot: would do (priority 500 -> 100; interruptible)\n")
    assert run(*choose).status == 0
    assert run("vm", "set", "other", "--no-interruptible").status == 0
    assert run("vm", "set", "other").status == Exit.USAGE
    assert run("vm", "set", "other", "--priority", "1001").status == Exit.REFUSED
    limits = ("--cpu-overcommit", "2", "--memory-overcommit", "1", "--reserve-cpus", "1", "--reserve-memory", "62GiB")
    assert run("pool", "set", *limits, "--network", "1Gbit", "--iops", "5000").status == 0
    assert run("pool", "set").status == Exit.USAGE
    unset = json.loads(run("-f", "json", "pool", "set", "--iops", "none", "--reserve-cpus", "0").out)["pool"]
    assert (unset["iops_capacity"], unset["network_capacity"], unset["reserve_cpus"]) == (None, 10**9, 0)
    assert run("pool", "set", "--iops", "5000", "--reserve-cpus", "1").status == 0
    shown = json.loads(run("-f", "json", "pool", "show").out)["pool"]
    assert [r["resource"] for r in shown] == ["cpu", "memory", "network", "iops"]
    assert (shown[1]["capacity"], shown[1]["free"]) == (2 << 30, 1 << 30)
    assert "1 GiB" in run("pool", "show").out
    kept = ("--cpu", "1.5", "--memory", "256MiB", "--net", "10Mbit", "--iops", "100", "--reason", "a release")
    when = ("--from", "+1h", "--for", "2h", "--half-life", "10min")
    would = run("-f", "json", "reserve", "create", "build-7", *kept, *when, "--dry-run")
    assert json.loads(would.out)["reservation"]["id"] is None
    assert run("reserve", "create", "build-7", *kept, *when).status == 0
    assert run("reserve", "create", "build-8", "--memory", "9GiB").status == Exit.REFUSED
    assert "build-7" in run("reserve", "list").out
    assert run("reserve", "release", "1").status == 0
    assert "build-7" not in run("reserve", "list").out
    assert "build-7" in run("reserve", "list", "--all").out
    demand = ("interrupt", "--need", "cpu=2,memory=1.25GiB", "--owner", "ci-9", "--for", "1h", "--return", "30min")
    demand += ("--by", "+0s", "--how", "save", "--gentlest", "save", "--grace", "1", "--within", "5min")
    planned = run(*demand, "--dry-run")
    assert planned.status == 0, planned.err
    assert "spot: save" in planned.out
    assert "other is not interruptible" in planned.out
    assert site.world.vm("spot").state.value == "running"
    done = json.loads(run("-f", "json", *demand).out)["interruption"]
    assert (done["demand"]["state"], [v["vm"] for v in done["victims"]]) == ("held", ["spot"])
    assert "spot" in run("resume").out
    assert run("resume", "--due", "--dry-run").status == 0
    for dry_run in ((), ("--dry-run",)):
        assert json.loads(run("-f", "json", "interrupt", "--due", *dry_run).out)["interruptions"] == []
    assert run("reserve", "release", str(done["demand"]["id"])).status == 0
    assert run("resume", "spot").status == 0
    assert run("interrupt", "spot", "--reason", "maintenance", "--grace", "1").status == 0
    for wrong in (("interrupt",), ("interrupt", "spot", "--need", "cpu=1"), ("interrupt", "--need", "cores=1")):
        assert run(*wrong).status == Exit.USAGE
    assert run("interrupt", "--need", "cpu=1", "--gentlest", "shutdown", "--how", "save").status == Exit.USAGE


def test_config_show_hides_the_password(run: Run, site: FakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVCTL_DATABASE_URL", "postgresql://hv:geheim@db.example/hv")
    for form in ("table", "json", "yaml", "csv"):
        ran = run("-f", form, "config", "show")
        assert ran.status == 0
        assert "geheim" not in ran.out + ran.err
        assert "HVCTL_DATABASE_URL" in ran.out


def test_config_show_says_which_file_it_could_not_read(
    run: Run, site: FakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hvctl" / "config.toml"
    file.parent.mkdir()
    file.touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert run("config", "show").err == ""
    monkeypatch.setattr("os.access", lambda path, mode: path != file or mode == os.F_OK)
    assert str(file) in run("config", "show").err


def test_the_connection_on_the_line_wins(run: Run, hosted: FakeSite, tmp_path: Path) -> None:
    assert "web" in run("-c", hosted.world.uri, "vm", "list").out
    assert "web" not in run("--connect", f"fake://{tmp_path}/other.json", "vm", "list").out


def test_completion_answers(run: Run, hosted: FakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    run("snapshot", "take", "web", "first")
    assert complete.vm_names("w") == ["web"]
    assert complete.vm_names("x") == []
    assert complete.image_names("m") == ["micro"]
    context = type("Context", (), {"params": {"vm": "web"}})()
    assert complete.snapshot_names(context, "f") == ["first"]
    context.params["vm"] = "nobody"
    assert complete.snapshot_names(context, "") == []


def test_completion_never_complains(run: Run, hosted: FakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    context = type("Context", (), {"params": {"vm": "web"}})()
    hosted.world.set_libvirt_down(True)
    assert complete.vm_names("") == []
    assert complete.snapshot_names(context, "") == []
    monkeypatch.setenv("HVCTL_RESERVE_MEMORY", "nonsense")
    assert complete.vm_names("") == []
    assert complete.snapshot_names(context, "") == []
