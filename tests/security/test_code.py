"""What hvctl's own code may never do, read from its syntax."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hvctl
from hvctl.adapters.qemu import qmp
from hvctl.adapters.qemu.qmp import Ahead, Qmp
from hvctl.errors import RefusedError

ROOT = Path(hvctl.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in FILES}


def imports() -> Iterator[tuple[str, str]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from ((name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield name, node.module
                yield from ((name, f"{node.module}.{alias.name}") for alias in node.names)


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield name, ast.unparse(node.func), node


def test_t11_no_archive_is_unpacked_and_nothing_is_unpickled() -> None:
    banned = {"tarfile", "zipfile", "pickle", "marshal", "shelve", "joblib", "dill", "shutil.unpack_archive"}
    assert not {(where, what) for where, what in imports() if what in banned}
    assert not [
        (w, f) for w, f, _ in calls() if f in {"eval", "exec", "compile", "__import__", "shutil.unpack_archive"}
    ]
    assert not [(w, f) for w, f, _ in calls() if f in {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}]


def test_t12_no_shell_and_no_fork() -> None:
    for where, function, call in calls():
        assert not any(k.arg == "shell" for k in call.keywords), where
        assert function not in {"os.system", "os.popen", "os.fork", "subprocess.getoutput"}, where
        if function in {"subprocess.run", "subprocess.Popen"}:
            assert not isinstance(call.args[0], ast.Constant | ast.JoinedStr), f"{where}: a command line as one text"
    assert "multiprocessing" not in {what.partition(".")[0] for _, what in imports()}


def test_t08_one_module_calls_qemu_img() -> None:
    users = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.List | ast.Tuple)
        and node.elts
        and isinstance(node.elts[0], ast.Constant)
        and node.elts[0].value == "qemu-img"
    }
    assert users == {"adapters/qemu/qemuimg.py"}


def test_t24_sql_text_is_constant() -> None:
    texts = [(w, c) for w, f, c in calls() if f in {"text", "sa.text", "sqlalchemy.text"} and w.startswith("adapters/")]
    texts = [(w, c) for w, c in texts if not w.startswith("adapters/libvirt/domainxml")]
    assert texts
    for where, call in texts:
        assert isinstance(call.args[0], ast.Constant), where


def test_t02_the_monitor_takes_a_closed_set_of_commands() -> None:
    dangerous = {"human-monitor-command", "migrate", "migrate-incoming", "object-add", "device_add", "chardev-add",
                 "quit", "system_reset", "xen-save-devices-state", "dump-guest-memory", "pmemsave", "memsave",
                 "screendump", "netdev_add", "block_passwd", "getfd", "add-fd"}  # fmt: skip
    assert qmp.COMMANDS & dangerous == {"human-monitor-command"}
    assert len(qmp.COMMANDS) <= 32
    session = Qmp("/nowhere", 1.0)
    for command in (*dangerous, "", "query-status ", "QUERY-STATUS"):
        with pytest.raises(RefusedError, match="not a monitor command"):
            session._execute(command, None, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "line",
    ["", "quit", "info registers", "gpa2hva", "gpa2hva 0x", "gpa2hva 0x1 ", "gpa2hva 0x1\n", "gpa2hva 0x1; quit",
     "i /w 0xae08", "i /w 0xae04 ", "i /b 0xae04", "o /w 0xae04 1", "i /w 0xae04; quit",
     "gpa2hva 0X1", "gpa2hva $pc", "gpa2hva 0x1 0x2", " gpa2hva 0x1", "gpa2hva 0x12345678123456789", 7, None],
)  # fmt: skip
def test_t02_of_the_monitor_for_people_two_questions_are_asked(line: object) -> None:
    """Whatever its place: alone, in a row, or before a job."""
    session, command = Qmp("/nowhere", 1.0), ("human-monitor-command", {"command-line": line})
    for ask in (
        lambda: session.execute(*command),  # type: ignore[arg-type]
        lambda: session.execute_all([("query-status", {}), command]),  # type: ignore[list-item]
        lambda: session.execute_all([("stop", {})], Ahead("snapshot-load", {}, [command], [])),  # type: ignore[list-item]
        lambda: session.job("snapshot-save", {}, 1.0, before=[command]),  # type: ignore[list-item]
    ):
        with pytest.raises(RefusedError, match="not a monitor command"):
            ask()
    with pytest.raises(RefusedError, match="not a monitor command"):
        session.execute("human-monitor-command")


def test_t02_every_monitor_command_in_the_code_is_a_literal() -> None:
    """So no text of a user can become one."""
    found = [(w, c) for w, f, c in calls() if f.endswith(("qmp.execute", "qmp.job"))]
    assert len(found) > 15
    # These are of the types Query, Job and Command, which hold only literals: nothing may be forced into them.
    typed = {"job", "command", "*question", "*leave_out_ram(False)"}
    for where, call in found:
        first = call.args[0]
        assert isinstance(first, ast.Constant) or ast.unparse(first) in typed, where
    talking = {where for where, what in imports() if what.startswith("hvctl.adapters.qemu.qmp")}
    for where in talking | {where for where, _ in found}:
        text = (ROOT / where).read_text()
        assert "cast(" not in text, where
        assert "type: ignore" not in text, where
