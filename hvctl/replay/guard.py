"""The guard of a replay: it decides as a node's does, of what a node would have seen of CPU and memory, and what it
lets grow is admitted as everything is. It looks every five minutes, and interrupts nobody."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from hvctl.decide import guardmeasures
from hvctl.decide.allocate import promised_after
from hvctl.decide.growth import growth
from hvctl.decide.guard import decide_doable
from hvctl.decide.victims import MIB
from hvctl.forecasting.series import STEP
from hvctl.model.allocation import Allocation, resources
from hvctl.model.guard import Act, Alternative, GuardDecision, GuardFacts, GuardMemory, GuardPolicy, Measure, Points
from hvctl.model.plan import Refusal
from hvctl.model.prediction import Prediction
from hvctl.replay.host import MARGIN, Guest, SimulatedHost, order
from hvctl.replay.sight import Sight

UNTOLD: Final[Mapping[Act, str]] = {
    Act.CACHE: "a trace does not tell what is page cache",
    Act.NET: "a trace has no connections",
    Act.RAM: "a trace has no snapshots",
    Act.DISK: "a trace has no disks and no snapshots",
    Act.WHOLE: "a trace has no snapshots",
}
"""Why it does nothing but grow."""


class Guard:
    """One policy for all VMs, and what it keeps of each from look to look."""

    def __init__(self, policy: GuardPolicy, sight: Sight) -> None:
        self._policy = policy
        self._sight = sight
        self._memory: dict[int, GuardMemory] = {}

    def step(
        self, hosts: Sequence[SimulatedHost], slot: int, forecasts: Mapping[int, Mapping[str, Prediction]]
    ) -> Iterator[tuple[Guest, GuardDecision]]:
        """One look at each VM that runs and is not guaranteed, at the beginning of a slot: what was decided, and is
        done. forecasts: the newest, by VM and resource."""
        for host in hosts:
            available = host.available()
            for guest in sorted((g for g in host.guests if g.runs and not g.member.guaranteed), key=order):
                facts = self._facts(host, guest, slot, available, forecasts.get(guest.member.number, {}))
                yield guest, self._done(host, guest, facts)

    def _done(self, host: SimulatedHost, guest: Guest, facts: GuardFacts) -> GuardDecision:
        goals: dict[str, Allocation] = {}

        def refusal(chosen: Alternative) -> str | None:
            goal = _goal(host, guest, chosen, facts.at)
            if isinstance(goal, Refusal):
                return goal.message
            goals[chosen.name] = goal
            return None

        _, decision = decide_doable(facts, self._policy, self._kept(guest), refusal)
        self._memory[guest.member.number] = decision.memory
        if decision.chosen is not None:
            guest.allocation = goals[decision.chosen.name]
        return decision

    def _kept(self, guest: Guest) -> GuardMemory:
        return self._memory.get(guest.member.number, GuardMemory())

    def _facts(
        self, host: SimulatedHost, guest: Guest, slot: int, available: int, forecasts: Mapping[str, Prediction]
    ) -> GuardFacts:
        """available: bytes of memory that the host has left. A trace has one number for the memory that a VM uses: it
        stands for what the host sees held, too."""
        now = float(self._sight.fleet.series.start + slot * STEP)
        since = self._kept(guest).since(now)

        def points(resource: str, unit: float) -> Points:
            found = self._sight.points(guest.member.number, resource, slot, self._policy.window, since)
            return tuple((at, value * unit) for at, value in found)

        def quantiles(resource: str, unit: float) -> tuple[tuple[float, float], ...]:
            one = forecasts.get(resource)
            return () if one is None else ((one.quantile, one.peak * unit),)

        vm, room, used = guest.vm(), host.room(guest, now), points("memory", MIB)
        measures: list[Measure] = [guardmeasures.cpu(vm, points("cpu", 1.0), room, quantiles("cpu", 1.0))]
        if used:
            measures.append(guardmeasures.memory(vm, used, (), room, MARGIN, quantiles("memory", MIB)))
            measures.append(guardmeasures.resident(used, available, self._policy.resident))
        refused = {a.part: why for a in self._policy.allow if (why := UNTOLD.get(a.act)) is not None}
        if guest.away is not None:
            refused = {a.part: f"{vm.name} is interrupted" for a in self._policy.allow}
        return GuardFacts(vm.name, now, tuple(measures), {}, refused)


def _goal(host: SimulatedHost, guest: Guest, chosen: Alternative, now: float) -> Allocation | Refusal:
    """What it has after that."""
    assert chosen.limit is not None
    vm = guest.vm()
    goal = promised_after(vm, growth(vm, chosen.resources[0], chosen.limit, MARGIN))
    if isinstance(goal, Refusal):
        return goal
    return host.refusal(guest, resources(goal), now) or goal
