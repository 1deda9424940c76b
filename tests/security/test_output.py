"""What guests and other people's domains say reaches a person as text, never as commands to a terminal."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.command import FakeSite
from hypothesis import given
from hypothesis import strategies as st

from hvctl.adapters.guest import agent
from hvctl.cli import render
from hvctl.cli.context import Format, Globals
from hvctl.cli.printable import in_json
from hvctl.cli.render import Column
from hvctl.errors import GuestError, HvctlError

pytestmark = pytest.mark.processes

HOSTILE = "x\x1b]0;owned\x07\x9b2J\u202e\u2066=cmd|'/c calc'!A0\r\nsecond,line\t\x7f\u2028<b>&\""
COLUMNS = (Column("name", "NAME"), Column("labels", "LABELS"))
ACTED_ON = {"Cc", "Cf", "Zl", "Zp", "Cs"}


def shown(form: Format, text: str, capsys: pytest.CaptureFixture[str]) -> str:
    render.rows(Globals(format=form), "vms", [{"name": text, "labels": {"k": text}}], COLUMNS)
    return capsys.readouterr().out


def acts(text: str) -> set[str]:
    return {c for c in text if unicodedata.category(c) in ACTED_ON} - {"\n"}


@pytest.mark.parametrize("form", Format)
def test_t21_no_control_character_reaches_the_terminal(form: Format, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(form, HOSTILE, capsys)
    assert acts(out) <= ({"\r", "\t"} if form is Format.CSV else set())  # the line ends of RFC 4180
    assert "\r" not in out.replace("\r\n", "\n")


def test_t21_json_and_yaml_give_the_very_text_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(shown(Format.JSON, HOSTILE, capsys))["vms"][0]["name"] == HOSTILE
    assert yaml.safe_load(shown(Format.YAML, HOSTILE, capsys))["vms"][0]["name"] == HOSTILE


def test_t21_a_name_stays_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(shown(Format.TABLE, HOSTILE, capsys).splitlines()) == 2
    assert len(list(csv.reader(io.StringIO(shown(Format.CSV, HOSTILE, capsys), newline="")))) == 2


@given(st.text())
def test_t21_json_escapes_are_lossless(text: str) -> None:
    line = in_json(json.dumps({text: text}, ensure_ascii=False))
    assert json.loads(line) == {text: text}
    assert not acts(line)


def test_t21_a_foreign_domain_with_such_a_name_is_listed_and_shown(tmp_path: Path) -> None:
    site = FakeSite(tmp_path)
    uuid = site.world.add_vm(HOSTILE)
    for form in Format:
        for words in (("vm", "list"), ("vm", "show", uuid)):
            done = site.run("-f", form.value, *words)
            assert done.returncode == 0, done.stderr
            assert acts(done.stdout) <= ({"\r", "\t"} if form is Format.CSV else set())
    assert site.json("vm", "show", uuid)["vm"]["name"] == HOSTILE
    refused = site.run("vm", "delete", uuid)
    assert refused.returncode != 0
    assert acts(refused.stderr) <= {"\t"}  # what libvirt lets a name hold, and a terminal only moves on for


def answers(*replies: Any) -> Callable[..., Any]:
    said = iter(replies)
    return lambda command, arguments, seconds: next(said)


@pytest.mark.parametrize(
    "reply",
    [None, [], "x", 7, {}, {"exited": "yes"}, {"exited": True}, {"exited": True, "exitcode": -1},
     {"exited": True, "exitcode": 1e9}, {"exited": True, "exitcode": True}, {"exited": True, "signal": "\x1b[2J"},
     {"exited": True, "exitcode": 0, "out-data": 5}, {"exited": True, "exitcode": 0, "out-data": "§§§§"},
     {"exited": True, "exitcode": 2**70}],
)  # fmt: skip
def test_t17_a_hostile_agent_is_a_guest_error(reply: Any) -> None:
    with pytest.raises(GuestError) as caught:
        agent.run(answers({"pid": 1}, reply), ["true"])
    assert "\x1b" not in caught.value.message


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
        max_leaves=8,
    )
)
def test_t17_whatever_the_agent_says_the_error_is_ours(reply: Any) -> None:
    for ask in (
        lambda: agent.run(answers(reply, reply), ["true"]),
        lambda: agent.online_vcpus(answers(reply)),
        lambda: agent.set_online(answers(reply, reply, reply), 2, 0.0),
        lambda: agent.set_time(answers(None, reply)),
    ):
        try:
            ask()
        except (HvctlError, StopIteration):
            continue


def test_t19_output_is_cut_before_it_is_decoded() -> None:
    flood = "QUFB" * 1_000_000
    result = agent.run(answers({"pid": 1}, {"exited": True, "exitcode": 0, "out-data": flood}), ["yes"], max_bytes=100)
    assert (len(result.stdout), result.truncated) == (100, True)
