"""The replay itself, five minutes at a time: promises shrink, who is due comes back, promises grow, new VMs start, and
then the demand of the five minutes comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from hvctl.decide.interrupt import Ask, Interruption
from hvctl.decide.needs import Known, expected_need
from hvctl.decide.reservations import Wanted
from hvctl.decide.victims import MIB, SQUEEZED_CPU
from hvctl.forecasting.panel import Panel
from hvctl.forecasting.series import F64, STEP
from hvctl.model.allocation import Allocation, Resources, resources
from hvctl.model.plan import Refusal
from hvctl.model.pool import Need
from hvctl.model.prediction import Prediction
from hvctl.model.vm import Vm
from hvctl.replay.fleet import COUNTED, Fleet
from hvctl.replay.goals import goal, lower, pressing, returning, within
from hvctl.replay.guard import Guard
from hvctl.replay.host import MARGIN, Guest, SimulatedHost, order
from hvctl.replay.policy import Amount, Policy
from hvctl.replay.sight import Sight
from hvctl.replay.tally import HIGH, Event, Tally

PER_UNIT: Final = {"cpu": 100, "memory": MIB}
"""From cores and MiB to what hosts count in."""


@dataclass(frozen=True, slots=True)
class Result:
    policy: Policy
    tally: Tally
    events: tuple[Event, ...]


def replay(fleet: Fleet, policy: Policy, panel: Panel, check: Callable[[Replay, int], None] | None = None) -> Result:
    """check is called after every step, with its slot."""
    one = Replay(fleet, policy, panel)
    for slot in range(fleet.begin, fleet.series.slots):
        one.step(slot)
        if check is not None:
            check(one, slot)
    one.close()
    return Result(policy, one.tally, tuple(one.events))


class Replay:
    """The state of one policy on one fleet. guests are in the order of the series' VMs, forecasts by their number and
    the resource."""

    def __init__(self, fleet: Fleet, policy: Policy, panel: Panel) -> None:
        self.fleet = fleet
        self.policy = policy
        self.guests = [Guest(m) for m in fleet.members]
        self.hosts = [
            SimulatedHost(c, [g for g in self.guests if g.member.host == h], self._used, self._need)
            for h, c in enumerate(fleet.capacities)
        ]
        self.tally = Tally(fleet.series.slots - fleet.begin)
        self.events: list[Event] = []
        self._sight = Sight(fleet, panel)
        self._guard = None if policy.guard is None else Guard(policy.guard.policy, self._sight)
        self._choose = policy.choice({m.uuid: m.priority for m in fleet.members})
        self.forecasts: dict[int, dict[str, Prediction]] = {}
        self._high = np.array([m.priority > HIGH for m in fleet.members])
        self._slot = fleet.begin

    @property
    def now(self) -> float:
        return float(self.fleet.series.start + self._slot * STEP)

    def step(self, slot: int) -> None:
        self._slot = slot
        self._come_and_go(slot)
        for host in self.hosts:
            host.follow(self.now)
        goals: dict[int, Allocation] = {}
        if (slot - self.fleet.begin) * STEP % self.policy.every == 0:
            if Amount.FORECAST in (self.policy.allocate, self.policy.reserve):
                self.forecasts = self._sight.forecasts(slot)
            goals = self._shrink()
        self._returns()
        self._grown(goals or pressing(self.policy, self.guests, self._used))
        self._look(slot)
        self._start()
        self._serve(slot)

    def close(self) -> None:
        """Whoever waits at the end has waited until then."""
        self._slot = self.fleet.series.slots
        for guest in self.guests:
            if guest.away is not None and guest.late:
                self.tally.waits.append(self.now - guest.away.return_at)

    # --- what a node sees, and what the policy makes of it

    def _used(self, guest: Guest) -> Resources:
        """In its newest sample."""
        cpu, memory = (float(self._sight.latest[r][guest.member.number]) for r in COUNTED)
        return Resources(math.ceil(cpu * 100), math.ceil(memory) * MIB)

    def _need(self, guest: Guest, vm: Vm) -> Need:
        return expected_need(vm, Known(self.forecasts.get(guest.member.number, {}), MARGIN), self.policy.back)

    def _goal(self, guest: Guest) -> Allocation:
        m = guest.member
        seen = self.hosts[m.host].seen(guest, self.now, guest.promised(m.size))
        return goal(self.policy, m, seen, guest.allocation, self._used(guest))

    # --- what happens

    def _say(self, guest: Guest, kind: str, detail: str = "") -> None:
        self.events.append(Event(self.now, guest.member.name, kind, detail))

    def _come_and_go(self, slot: int) -> None:
        for guest in self.guests:
            m = guest.member
            if slot == max(m.first, self.fleet.begin) and slot < m.last:
                guest.starts = True
            elif slot == m.last:
                guest.allocation, guest.away, guest.starts, guest.late = None, None, False, False
                self.hosts[m.host].end(m.uuid)

    def _returns(self) -> None:
        """Of those that are due, the longest away first."""
        away = [(g.away.out_at, g.member.number, g.away) for g in self.guests if g.away is not None]
        for _, number, before in sorted(away, key=lambda one: one[:2]):
            guest = self.guests[number]
            was = guest.late
            if self.hosts[guest.member.host].come_back(guest, self.now):
                self.tally.returns += 1
                self.tally.waits.append(self.now - before.return_at)
                self._say(guest, "returned", before.rung.value)
            elif guest.late and not was:
                self.tally.waited += 1
                self._say(guest, "waits", before.rung.value)

    def _shrink(self) -> dict[int, Allocation]:
        """What everybody that runs is to have, by number, after those that are to have less have less."""
        goals = {}
        for guest in self.guests:
            if guest.allocation is not None and guest.away is None:
                goals[guest.member.number] = self._goal(guest)
                guest.allocation = lower(guest.allocation, goals[guest.member.number])
        return goals

    def _grown(self, goals: Mapping[int, Allocation]) -> None:
        """The guaranteed ones first, then the higher priorities."""
        for guest in sorted((self.guests[n] for n in goals), key=order):
            new = goals[guest.member.number]
            # An earlier one may have interrupted it meanwhile.
            if guest.away is None and guest.allocation != new:
                self._grow(self.hosts[guest.member.host], guest, new)

    def _grow(self, host: SimulatedHost, guest: Guest, new: Allocation) -> None:
        want = resources(new)
        if host.fits(guest, want, self.now) or self._freed(host, guest, want):
            guest.allocation = new
            return
        guest.allocation = within(new, host.free(guest, want, self.now))

    def _freed(self, host: SimulatedHost, guest: Guest, want: Resources) -> bool:
        """By interruptions of others, as far as the policy goes; whether it fits then."""
        p, now = self.policy, self.now
        keeps = p.reserve is not Amount.NONE
        until = None if keeps and not p.insist else now
        ask = Ask(want, guest.member.uuid, p.lasts, p.back, until, p.rungs, p.grace)
        plan = host.plan(guest, ask, now, self._choose)
        if isinstance(plan, Refusal):
            self._say(guest, "refused", plan.message)
            return False
        if plan.at > now:
            self._say(guest, "delayed", "; ".join(plan.reasons))
            return False
        if not keeps:
            plan = replace(plan, shrinks=())
        self._interrupt(host, plan, ask)
        # Handed over at once: until then it is the owner's alone.
        ends = None if p.lasts is None else now + p.lasts
        demand = host.reserve(Wanted(guest.member.uuid, "its demand", want, now, ends), now)
        fits = host.fits(guest, want, now)
        host.reservations.remove(demand)
        return fits

    def _interrupt(self, host: SimulatedHost, plan: Interruption, ask: Ask) -> None:
        def returns(guest: Guest, need: Allocation) -> tuple[Allocation, Resources]:
            return returning(self.policy, guest.member, need)

        for guest in host.interrupt(plan, ask, self.now, returns):
            rung = guest.away.rung.value if guest.away else ""
            self.tally.interruptions[rung] = self.tally.interruptions.get(rung, 0) + 1
            self._say(guest, "interrupted", rung)

    def _look(self, slot: int) -> None:
        for guest, decision in () if self._guard is None else self._guard.step(self.hosts, slot, self.forecasts):
            self.tally.look(decision)
            if decision.chosen is not None:
                self._say(guest, "guarded", decision.reason)

    def _start(self) -> None:
        """VMs that are new, or that never fitted yet, the guaranteed ones first."""
        for guest in sorted((g for g in self.guests if g.starts), key=order):
            host = self.hosts[guest.member.host]
            first = self._goal(guest)
            want = resources(first)
            if host.fits(guest, want, self.now) or self._freed(host, guest, want):
                self._started(guest, first)
            elif self._slot == self.fleet.begin and self.policy.allocate is Amount.FORECAST:
                # It ran before: it goes on with what there is, as one that cannot grow does.
                got, used = host.free(guest, want, self.now), self._used(guest)
                if got.cpu >= SQUEEZED_CPU and got.memory >= used.memory + MARGIN:
                    self._started(guest, within(first, got))

    def _started(self, guest: Guest, first: Allocation) -> None:
        guest.allocation, guest.starts, guest.since = first, False, self.now
        self._say(guest, "started")

    def _serve(self, slot: int) -> None:
        runs = np.array([g.runs for g in self.guests])
        served: dict[str, F64] = {}
        for resource in COUNTED:
            unit = PER_UNIT[resource]
            demand = self.fleet.demand[resource][:, slot].astype(np.float64)
            given = np.array([getattr(g.holds, resource) if g.runs else 0 for g in self.guests])
            served[resource] = np.minimum(demand, given / unit)
            lacking = demand - served[resource]
            found = {
                "demand": demand.sum(),
                "served": served[resource].sum(),
                "away": lacking[~runs].sum(),
                "high": lacking[self._high].sum(),
                "promised": sum(getattr(g.holds, resource) for g in self.guests) / unit,
                "kept": sum(getattr(h.kept(self.now), resource) for h in self.hosts) / unit,
            }
            self.tally.step(slot - self.fleet.begin, resource, {name: float(v) for name, v in found.items()})
        self._sight.note(slot, served, runs)
