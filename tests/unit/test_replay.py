"""Policies on a recorded trace: nothing is promised that is not there, nothing of the future is known, and what is
added up is what happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from faults.command import FakeSite

from hvctl.adapters.models import seriesfile
from hvctl.decide.victims import MIB
from hvctl.errors import NotFoundError, UsageError
from hvctl.forecasting.panel import Ask, Panel
from hvctl.forecasting.series import F32, STEP, Series
from hvctl.model.allocation import Allocation, Resources
from hvctl.model.guard import Allowed, GuardPolicy, Watch
from hvctl.model.host import Capacity
from hvctl.model.pool import Rung
from hvctl.operations import guardpolicy
from hvctl.operations.replaypolicy import chosen, load, shipped
from hvctl.packing.cover import Candidate
from hvctl.replay.fleet import COUNTED, Fleet, Member, fleet_of
from hvctl.replay.guard import Guard
from hvctl.replay.policy import Amount, Policy, Victims, lowest_priority_first
from hvctl.replay.run import Replay, Result, replay
from hvctl.replay.sight import Sight
from unit.commandline import Run, runner
from unit.fleets import fleet as waves
from unit.test_cli import golden

DAY = 288
README = Path(__file__).parents[2] / "snapshots" / "README.md"


def trace(vms: int = 12, days: float = 1.5, seed: int = 1, busy: float = 2.0) -> Series:
    """Waves and bursts of VMs of 4 cores and 8 GiB, some of which come later and one of which goes."""
    made = waves(vms, days, seed, ("cpu", "memory"))
    sizes = {"cpu": np.full(vms, 4, np.float32), "memory": np.full(vms, 8192, np.float32)}
    values = {"cpu": made.values["cpu"] * (busy / 6), "memory": made.values["memory"] * (busy / 3)}
    for i in range(0, vms, 6):
        for found in values.values():
            found[i, : found.shape[1] // 2 + 7 * i] = np.nan
    for found in values.values():
        found[1, -50:] = np.nan
    return Series(made.vms, made.start, values, sizes)


def fleet(series: Series | None = None, fit: float = 0.6, seed: int = 1) -> Fleet:
    return fleet_of(series or trace(), begin=DAY, fit=fit, hosts=2, seed=seed)


POLICIES = [load(name) for name in shipped()]
TIGHT = Policy("tight", rungs=tuple(Rung), lasts=3600.0, insist=True)
EAGER = GuardPolicy(
    "Grows at the first look",
    (Allowed("grow"), Allowed("cache")),
    threshold=1.0,
    looks=1,
    window=900.0,
    cool_down=300.0,
)
GUARDED = replace(TIGHT, name="tight-guarded", guard=Watch("eager", EAGER))
ROOMY = Policy("percent-guarded", allocate=Amount.PERCENT, reserve=Amount.NONE, percent=30, guard=Watch("eager", EAGER))


def whole(one: Replay, slot: int) -> None:
    """After every step."""
    for host in one.hosts:
        held = sum((r for _, r in host.held().values()), Resources())
        assert held.cpu <= host.capacity.cpu
        assert held.memory <= host.capacity.memory
    placed = [g for host in one.hosts for g in host.guests]
    assert sorted(g.member.number for g in placed) == list(range(len(one.guests)))
    for guest in one.guests:
        there = max(guest.member.first, one.fleet.begin) <= slot < guest.member.last
        at_work = guest.runs and guest.away is None
        assert (at_work, guest.away is not None, guest.starts, not there).count(True) == 1, guest.member.name
        if guest.away:
            assert guest.allocation == (None if guest.away.rung.ends_process else guest.away.left)
        if guest.member.guaranteed and guest.runs:
            assert guest.allocation == guest.member.size


@pytest.mark.parametrize("policy", [*POLICIES, TIGHT, GUARDED], ids=lambda p: p.name)
@pytest.mark.parametrize("fit", [0.4, 0.6])
def test_nothing_is_promised_twice_and_everybody_is_somewhere(policy: Policy, fit: float) -> None:
    made = replay(fleet(trace(), fit), policy, Panel(), whole)
    for resource in COUNTED:
        rows = made.tally.shown[resource]
        demand, served, promised = rows[:, 0], rows[:, 1], rows[:, 2]
        assert (served <= demand + 1e-3).all()
        assert (served <= promised + 1e-3).all()
        total = made.tally.row("")
        lacking = total[f"{resource}_unserved"]
        assert lacking >= total[f"{resource}_unserved_away"] * (1 - 1e-6) >= 0
        assert lacking / STEP * (1024 if resource == "memory" else 1) == pytest.approx(
            (demand - served).sum(), rel=1e-5
        )
        known = made.tally.demand[resource]
        assert known == pytest.approx(float(fleet(trace()).demand[resource][:, DAY:].sum()), rel=1e-5)


def test_the_fleets_of_these_tests_are_short_of_room() -> None:
    """Otherwise they would show nothing."""
    made = replay(fleet(), TIGHT, Panel())
    assert sum(made.tally.interruptions.values()) > 10
    assert made.tally.waited > 3
    guarded = replay(fleet(), GUARDED, Panel()).tally
    assert min(guarded.guard_actions[name] for name in ("grow:cpu", "grow:memory")) > 10
    assert guarded.interruptions["squeeze"] > 0, "who is squeezed is looked at, too"


@pytest.mark.parametrize("policy", [TIGHT, GUARDED], ids=lambda p: p.name)
def test_the_same_seed_gives_the_same_replay(policy: Policy) -> None:
    first, second = (replay(fleet(seed=3), policy, Panel()) for _ in range(2))
    assert first.events == second.events
    assert first.tally.row("") == second.tally.row("")
    assert [m.priority for m in fleet(seed=3).members] != [m.priority for m in fleet(seed=4).members]


@pytest.mark.parametrize("policy", [load("forecast"), TIGHT, GUARDED, ROOMY], ids=lambda p: p.name)
def test_another_future_changes_no_decision_of_the_past(policy: Policy) -> None:
    """Up to the step in which it begins to differ, that step's own decisions included."""
    series, turn = trace(), DAY + 77
    other = {r: v.copy() for r, v in series.values.items()}
    for values in other.values():
        later = values[:, turn:]
        later[np.isfinite(later)] *= np.float32(0.1)
        values[: len(values) // 2, turn:] *= np.float32(30)
    decided: list[list[object]] = []
    for one in (series, replace(series, values=other)):
        states: list[object] = []

        def note(made: Replay, slot: int, states: list[object] = states) -> None:
            states.append((slot, [(g.allocation, g.away) for g in made.guests]))

        replay(fleet(one), policy, Panel(), note)
        decided.append(states)
    both = turn - DAY + 1
    assert decided[0][:both] == decided[1][:both]
    assert decided[0] != decided[1]


# --- by hand


def by_hand(
    cores: dict[str, list[float]], members: dict[str, tuple[int, bool]], capacity: int, begin: int = 24
) -> Fleet:
    """VMs of 2 cores and 1 GiB that use 256 MiB while they are there (not NaN). members: priority, guaranteed."""
    cpu = np.array([[1.0] * begin + c for c in cores.values()], np.float32)
    absent = np.isnan(cpu)
    cpu[absent.any(axis=1), :begin] = np.nan
    memory = np.where(np.isnan(cpu), np.float32(np.nan), np.float32(256))
    n = len(cores)
    sizes: dict[str, F32] = {"cpu": np.full(n, 2, np.float32), "memory": np.full(n, 1024, np.float32)}
    series = Series(tuple(cores), 0, {"cpu": cpu, "memory": memory}, sizes)
    known = np.isfinite(cpu)
    made = tuple(
        Member(
            i, name, name, 0, Allocation(2, 1024 * MIB), *members[name], int(known[i].argmax()),
            series.slots - int(known[i, ::-1].argmax()),
        )
        for i, name in enumerate(cores)
    )  # fmt: skip
    demand = {r: np.nan_to_num(v) for r, v in series.values.items()}
    return Fleet(made, (Capacity(capacity, 1 << 40),), series, demand, begin)


def test_a_tiny_trace_by_hand() -> None:
    """Two VMs fill the host; a guaranteed one comes after 5 minutes and stays for 95. The lower of the two goes, is due
    an hour later, waits until the other has gone, and comes back."""
    gone = float("nan")
    cores = {"first": [gone] + [2.0] * 19 + [gone] * 4, "low": [1.0] * 24, "high": [1.5] * 24}
    members = {"first": (500, True), "low": (100, False), "high": (500, False)}
    policy = Policy(
        "hand", allocate=Amount.FULL, reserve=Amount.NONE, victims=Victims.LOWEST_PRIORITY, rungs=(Rung.SAVE,),
        insist=True,
    )  # fmt: skip
    made = replay(by_hand(cores, members, 400), policy, Panel(), whole)
    at = {(e.vm, e.kind): round(e.at / STEP) - 24 for e in made.events}
    assert at == {
        ("high", "started"): 0, ("low", "started"): 0, ("low", "interrupted"): 1, ("first", "started"): 1,
        ("low", "waits"): 13, ("low", "returned"): 20,
    }  # fmt: skip
    row = made.tally.row("hand")
    assert (row["by_rung"], row["returns"], row["waited"]) == ({"save": 1}, 1, 1)
    assert row["wait_mean"] == row["wait_max"] == 7 * 300
    assert row["cpu_demand"] == 300 * (19 * 2 + 24 + 24 * 1.5)
    assert row["cpu_unserved"] == row["cpu_unserved_away"] == 300 * 19
    assert row["cpu_unserved_high"] == 0  # its priority is 100
    assert row["cpu_reserved"] == 300 * 24 * 4  # always two of them
    assert row["cpu_unused"] == row["cpu_reserved"] - (row["cpu_demand"] - row["cpu_unserved"])
    assert row["memory_unserved"] == pytest.approx(300 * 19 * 0.25)


def test_a_static_percentage_serves_its_share() -> None:
    cores = {"a": [1.5] * 12, "b": [0.5] * 12}
    policy = Policy("half", allocate=Amount.PERCENT, reserve=Amount.PERCENT, percent=50)
    made = replay(by_hand(cores, {"a": (500, False), "b": (500, False)}, 400), policy, Panel(), whole)
    row = made.tally.row("half")
    assert row["cpu_unserved"] == pytest.approx(0.5 * 12 * 300)
    assert row["cpu_unserved_away"] == 0
    assert row["cpu_reserved"] == pytest.approx(2 * 12 * 300)
    assert row["memory_reserved"] == pytest.approx(2 * 0.5 * 12 * 300)


def test_what_is_kept_for_a_return_is_nobody_elses() -> None:
    """With room kept the victim is back when it is due; a third VM that came meanwhile waits."""
    gone = float("nan")
    cores = {"first": [gone] + [1.0] * 10 + [gone] * 23, "victim": [1.0] * 34, "late": [gone] * 4 + [1.0] * 30}
    members = {"first": (500, True), "victim": (100, False), "late": (100, False)}
    policy = Policy("kept", allocate=Amount.FULL, reserve=Amount.FULL, rungs=(Rung.SAVE,), lasts=3600.0)
    returned = {}
    for reserve in (Amount.FULL, Amount.NONE):
        made = replay(by_hand(cores, members, 200), replace(policy, reserve=reserve), Panel(), whole)
        returned[reserve] = {(e.vm, e.kind): round(e.at / STEP) - 24 for e in made.events}
    assert returned[Amount.FULL]["victim", "returned"] == 13
    assert ("late", "started") not in returned[Amount.FULL]
    assert returned[Amount.NONE]["late", "started"] == 11
    assert ("victim", "returned") not in returned[Amount.NONE]


def test_what_ran_before_the_replay_runs_on_with_what_there_is() -> None:
    """The higher one has what is forecast for it, the lower one the rest; one that comes later has to fit wholly."""
    gone = float("nan")
    members = {"high": (900, False), "low": (100, False), "late": (100, False)}
    cores = {"high": [1.0] * 12, "low": [1.0] * 12, "late": [gone] * 2 + [1.0] * 10}
    made = replay(by_hand(cores, members, 180), Policy("f", press=1.0), Panel(), whole)
    assert [(e.vm, e.kind) for e in made.events if e.kind != "refused"] == [("high", "started"), ("low", "started")]
    row = made.tally.row("f")
    assert row["cpu_unserved_away"] == pytest.approx(10 * 300)
    assert row["cpu_unserved"] - row["cpu_unserved_away"] == pytest.approx(
        0.46 * 12 * 300, rel=1e-5
    )  # 1.26 and 0.54 of 1.8


def test_a_vm_that_uses_all_it_has_gets_more_before_the_next_round() -> None:
    cores = {"a": [0.1] * 12 + [2.0] * 12}
    fleets = by_hand(cores, {"a": (500, False)}, 400)
    quiet = replace(
        fleets, demand={**fleets.demand, "cpu": np.where(fleets.demand["cpu"] == 1, 0.1, fleets.demand["cpu"])}
    )
    lacking = [
        replay(quiet, Policy("p", press=press), Panel()).tally.row("")["cpu_unserved"] for press in (1.0, 1.5, 4.0)
    ]
    assert lacking[0] > lacking[1] > lacking[2] > 0


# --- a guard by hand


def half(guard: GuardPolicy) -> Policy:
    """Everybody is promised one of two cores once and for all; nobody forecasts."""
    watch = Watch("of a test", guard)
    return Policy("g", allocate=Amount.PERCENT, reserve=Amount.NONE, percent=50, every=86400.0, guard=watch)


PATIENT = GuardPolicy("Grows at the second look", (Allowed("grow"),), window=900.0, cool_down=900.0)


def grown(made: Result) -> list[tuple[str, int]]:
    """Who, and at which step."""
    return [(e.vm, round(e.at / STEP) - 24) for e in made.events if e.kind == "guarded"]


def test_a_guard_lets_grow_once_and_cools_down_before_the_second_time() -> None:
    """It starts at step 0. One core is used up at both looks after that: 1.25 from step 2 on. What was measured before
    counts no more; 1.25 are used up at step 3, too, but for 15 minutes nothing is done: 1.57 from step 5 on."""
    fleets = by_hand({"a": [1.4] * 7}, {"a": (500, False)}, 400)
    quotas: list[int | None] = []

    def note(one: Replay, slot: int) -> None:
        whole(one, slot)
        quotas.append(one.guests[0].allocation.cpu_quota if one.guests[0].allocation else None)

    made = replay(fleets, half(PATIENT), Panel(), note)
    assert quotas == [100, 100, 125, 125, 125, 157, 157]
    assert grown(made) == [("a", 2), ("a", 5)]
    row = made.tally.row("g")
    assert (row["guard_looks"], row["guard_actions"]) == (6, {"grow:cpu": 2})
    assert row["cpu_unserved"] == pytest.approx(300 * (2 * 0.4 + 3 * 0.15))
    assert row["cpu_reserved"] == pytest.approx(300 * (2 + 3 * 1.25 + 2 * 1.57))
    sooner = replay(fleets, half(replace(PATIENT, cool_down=300.0)), Panel(), whole)
    assert grown(sooner) == [("a", 2), ("a", 4)]
    at_once = replay(fleets, half(replace(PATIENT, looks=1)), Panel(), whole)
    assert grown(at_once) == [("a", 1), ("a", 4)]


def test_what_a_guard_lets_grow_is_no_trend() -> None:
    """1.0 before it has more and 1.1 ever since is no rise from 1.0 to 1.1."""
    fleets = by_hand({"a": [1.1] * 8}, {"a": (500, False)}, 400)
    made = replay(fleets, half(replace(PATIENT, looks=1, cool_down=300.0)), Panel(), whole)
    assert grown(made) == [("a", 1)]


def test_a_guard_lets_nobody_grow_beyond_the_host_and_interrupts_nobody() -> None:
    """Twenty percent are left: the higher one gets them, the lower one nothing; the guaranteed one is not looked at."""
    cores = {"low": [1.4] * 6, "high": [1.4] * 6, "sure": [2.0] * 6}
    members = {"low": (100, False), "high": (900, False), "sure": (500, True)}
    made = replay(by_hand(cores, members, 420), half(PATIENT), Panel(), whole)
    assert grown(made) == [("high", 2)]
    assert made.tally.guard_looks == 10
    assert made.tally.row("g")["cpu_unserved"] == pytest.approx(300 * (6 * 0.4 + 2 * 0.4 + 4 * 0.2), rel=1e-5)
    assert not made.tally.interruptions


def test_what_is_asked_for_beside_growing_is_refused_since_a_trace_does_not_tell() -> None:
    fleets = by_hand({"a": [1.4] * 3}, {"a": (500, False)}, 400)
    parts = ("grow", "cache", "net", "ram:0x0-0x1000", "disk:scratch", "whole")
    asked = GuardPolicy("All", tuple(Allowed(p, 0.0, ("resident",), 0.5) for p in parts), to="clean", window=900.0)
    one = Replay(fleets, replace(half(asked), guard=None), Panel())
    one.step(24)
    ((_, decision),) = Guard(asked, Sight(fleets, Panel())).step(one.hosts, 24, {})
    reasons = {a.part: a.refused for a in decision.alternatives}
    assert all("a trace " in (why or "") for part, why in reasons.items() if part != "grow"), reasons
    assert {o.resource for o in decision.outlooks} == {"cpu", "memory", "resident"}
    (resident,) = (o for o in decision.outlooks if o.resource == "resident")
    assert resident.limit == 1 << 40, "of what the host has, only this VM's 256 MiB are used"


def test_a_guard_sees_what_was_served_before_now_and_nothing_while_it_was_away() -> None:
    fleets = by_hand({"a": [1.4] * 6, "b": [1.0] * 6}, {"a": (500, False), "b": (500, False)}, 400)
    sight = Sight(fleets, Panel())
    for slot, runs in enumerate((True, False, True), 24):
        sight.note(slot, dict.fromkeys(COUNTED, np.array([0.5 + slot, 9.0])), np.array([runs, True]))
    assert sight.points(0, "cpu", 27, 900.0, None) == ((7200.0, 1.0), (7500.0, 24.5), (8100.0, 26.5))
    assert sight.points(0, "cpu", 26, 300.0, None) == ((7500.0, 24.5),)
    assert sight.points(0, "cpu", 27, 900.0, 7500.0) == ((8100.0, 26.5),)
    assert sight.points(0, "cpu", 1, 900.0, None) == ((300.0, 1.0),)


def test_lowest_priority_first_takes_no_more_than_it_needs() -> None:
    some = [Candidate(k, "", 1.0, Resources(100)) for k in "abc"] + [Candidate("d", "", 1.0, Resources(memory=5))]
    choose = lowest_priority_first({"a": 900, "b": 100, "c": 500, "d": 0})
    found = choose(some, {"": Resources(150)})
    assert found is not None
    assert found.keys == ("b", "c")
    assert choose(some, {"": Resources(350)}) is None


# --- who answers


class Oracle:
    """A model that says the base itself, whatever it is asked."""

    def within(self, seconds: float) -> Ask:
        return lambda key, x: np.zeros(len(x), np.float32)


def test_a_model_answers_once_it_has_won_on_the_trace() -> None:
    series = trace(30, 2.5)
    for values in series.values.values():
        values[:] = np.float32(1.0)  # its own base is right then, and the rule's margin is not
    made = fleet_of(series, begin=2 * DAY - 6, fit=0.6, hosts=1)
    seen = []
    replay(
        made,
        load("forecast"),
        Panel(models=Oracle(), name="m"),
        lambda one, _: seen.append(one.forecasts[0]["cpu"].rule),
    )
    assert seen[0] == "max_of_hour_and_clock"
    assert seen[-1] == "m"


def test_it_learns_of_an_hour_when_that_is_over() -> None:
    """Also where it forecasts more often than once an hour."""
    made = fleet()
    sight = Sight(made, Panel())
    learned = []
    for slot in range(DAY, DAY + 27):
        if slot % 3 == 0:
            sight.forecasts(slot)
            learned.append((slot - DAY, max((f.cases for f in sight._lessons.fleet()), default=0)))
        everybody = np.full(len(made.members), True)
        sight.note(slot, {r: made.demand[r][:, slot].astype(np.float64) for r in COUNTED}, everybody)
    known = [cases > 0 for _, cases in learned]
    assert known == [slot >= 12 for slot, _ in learned]
    assert learned[-1][1] > learned[4][1], "and of the next one, when that is"


# --- what is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: replace(s, values={"cpu": s.values["cpu"]}), "no memory"),
        (lambda s: replace(s, sizes={"cpu": s.sizes["cpu"]}), "no memory"),
        (lambda s: s.until(DAY), "cannot be replayed"),
    ],
)
def test_a_trace_that_cannot_be_replayed(change: Callable[[Series], Series], words: str) -> None:
    with pytest.raises(UsageError, match=words) as e:
        fleet(change(trace()))
    assert e.value.hint


@pytest.mark.parametrize("asked", [{"fit": 0.0}, {"hosts": 0}, {"hosts": 13}, {"vms": 13}, {"begin": 3}])
def test_a_fleet_that_cannot_be(asked: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        fleet_of(trace(), **{"begin": DAY, "fit": 0.6, **asked})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('allocates = "full"', "says 'allocates', which means nothing"),
        ('allocate = "half"', "is not one"),
        ('reserve = "percent"', "names no percent"),
        ('allocate = "none"', "allocates nothing"),
        ("percent = 120", "outside 0 to 100"),
        ("back = 3600", "has no unit"),
        ('back = "soon"', "is not one"),
        ('every = "7min"', "no multiple of 5min"),
        ("press = 0.5", "outside 1 to 100"),
        ("rungs = []", "no rungs"),
        ("allocate =", "cannot be read"),
    ],
)
def test_a_policy_that_is_none(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as e:
        load(str(path))
    assert e.value.hint


def test_policies_by_name_and_by_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('every = "30min"\nlasts = "2h"\nrungs = ["save"]\n')
    assert load(str(path)) == Policy("mine", every=1800.0, lasts=7200.0, rungs=(Rung.SAVE,))
    with pytest.raises(NotFoundError, match="no replay policy 'nobody'"):
        load("nobody")
    assert [p.name for p in chosen(["static", str(path), "static"])] == ["static", "mine", "lowest-priority-first"]
    same = tmp_path / "static.toml"
    same.write_text("percent = 50\n")
    with pytest.raises(UsageError, match="two policies are called 'static'"):
        chosen([str(same)])
    text = README.read_text()
    assert len(shipped()) == 6
    for name in shipped():
        assert len(load(name).description) > 20
        assert f"**{name}**" in text


def test_a_policy_names_a_guard_that_is_shipped_or_lies_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('guard = "careful"\n')
    assert load(str(path)).guard == guardpolicy.load("careful")
    assert load(str(path)).pressing == 1.0
    (tmp_path / "guard.toml").write_text('description = "of a test"\n[[allow]]\npart = "grow"\n')
    path.write_text('guard = "guard.toml"\n')
    assert load(str(path)).guard == Watch("guard.toml", GuardPolicy("of a test", (Allowed("grow"),)))
    path.write_text('guard = "nobody"\n')
    with pytest.raises(NotFoundError, match="no guard policy 'nobody'") as missing:
        load(str(path))
    assert "careful" in (missing.value.hint or "")
    (tmp_path / "guard.toml").write_text('description = "of a test"\n')
    for text, words in (('"guard.toml"', "not one"), ("7", "names no guard policy")):
        path.write_text(f"guard = {text}\n")
        with pytest.raises(UsageError, match=words) as wrong:
            load(str(path))
        assert wrong.value.hint


# --- the command


@pytest.fixture
def run(site: FakeSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(site, monkeypatch, capsys)


def test_what_the_command_prints_and_draws(run: Run, tmp_path: Path) -> None:
    file, picture = tmp_path / "trace.csv", tmp_path / "replay.svg"
    seriesfile.write(file, trace())
    line = (str(file), "--rules", "--hosts", "2", "--fit", "0.4", "--after", "1d", "--plot", str(picture))
    asked = ("forecast", "forecast-guarded", "full-size")
    ran = run("replay", *line, *(word for name in asked for word in ("--policy", name)))
    golden("cli-replay-table", f"{ran.out}--- stderr\n{ran.err}--- exit {ran.status}\n")
    assert "full-size" in picture.read_text()
    some = ("--vms", "10", "--seed", "2", "--for", "6h")
    document = json.loads(run("-f", "json", "replay", *line, *some).out)["replay"]
    assert [p["policy"] for p in document["policies"]] == ["forecast", "lowest-priority-first", "static"]
    assert all((p["guard_looks"], p["guard_actions"]) == (0, {}) for p in document["policies"])
    assert (document["vms"], document["hosts"], document["seed"], document["seconds"]) == (10, 2, 2, 21600)
    assert run("replay", str(tmp_path / "no.csv")).status == 3
    assert run("replay", str(file), "--plot", "picture.gif").status == 2
