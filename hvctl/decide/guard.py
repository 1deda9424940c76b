"""What a guard does about a VM: from what runs out, and when, to the one action that avoids most contention for its
cost, or to nothing. It looks at no clock and at nothing but its arguments, so a replay decides as a node does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from hvctl.decide.exhaustion import outlook
from hvctl.model.guard import (
    Act,
    Allowed,
    Alternative,
    Cost,
    GuardDecision,
    GuardFacts,
    GuardMemory,
    GuardPolicy,
    Measure,
    Outlook,
    Verdict,
)

DEFAULT_COSTS: Mapping[Act, float] = {
    Act.GROW: 0.1,
    Act.CACHE: 5.0,
    Act.NET: 0.1,
    Act.RAM: 1.0,
    Act.DISK: 1.0,
    Act.WHOLE: 1.0,
}
"""Seconds of pause that a reset is taken to cost while the journal has none of its kind on the VM."""

DEFAULT_TAKE = 1.0
"""The same for the snapshot that a policy has taken first."""

_ORDER = tuple(Act)


def decide(facts: GuardFacts, policy: GuardPolicy, memory: GuardMemory) -> GuardDecision:
    """The answer for one VM at one moment. At most one action; never a part that the policy does not allow."""
    view = _View(facts, policy, memory)
    known = {m.resource: (m, now) for m in facts.measures if (now := view(m)) is not None}
    pressed = _pressed(known, policy, memory)
    ranked = sorted(
        (a for allowed in policy.allow for a in _alternatives(allowed, known, view)),
        key=lambda a: (a.refused is not None, -a.score, _ORDER.index(a.act), a.part, a.resources),
    )
    kept = GuardMemory(pressed, memory.acted_at, memory.acted)
    outlooks = tuple(now for _, now in known.values())

    def nothing(verdict: Verdict, reason: str = "") -> GuardDecision:
        return GuardDecision(verdict, None, reason or verdict.value, outlooks, tuple(ranked), kept)

    if not pressed:
        return nothing(Verdict.QUIET if known else Verdict.UNSEEN)
    ripe = [r for r, looks in pressed.items() if looks >= policy.looks]
    if not ripe:
        return nothing(Verdict.FIRST_LOOK, f"{_words(pressed)}: it is looked at again before anything is done")
    acted_at = memory.since(facts.at)
    if acted_at is not None and facts.at - acted_at < policy.cool_down:
        left = policy.cool_down - (facts.at - acted_at)
        return nothing(Verdict.COOLING, f"cooling down after {memory.acted} for another {left:.0f} s")
    able = [a for a in ranked if a.refused is None and set(a.resources) & set(ripe)]
    if not able:
        return nothing(Verdict.UNABLE, f"{_words(ripe)}, and nothing that the policy allows can be done about it")
    best = able[0]
    if best.score < policy.threshold:
        avoided = f"{best.name} would avoid {best.benefit:.0f} resource-seconds for {best.cost:.1f} s"
        return nothing(Verdict.NOT_WORTH, f"{avoided}, which is less than the threshold of {policy.threshold:.0f}")
    reason = f"{_words(ripe)}; {best.name} avoids {best.benefit:.0f} resource-seconds for {best.cost:.1f} s"
    acted = GuardMemory({}, facts.at, best.name)
    return GuardDecision(Verdict.ACTS, best, reason, outlooks, tuple(ranked), acted)


def decide_doable(
    facts: GuardFacts, policy: GuardPolicy, memory: GuardMemory, refusal: Callable[[Alternative], str | None]
) -> tuple[GuardFacts, GuardDecision]:
    """The same, where what would be refused is no choice. refusal: why it would be, None if it would not; the facts
    that come back have that, too."""
    while True:
        decision = decide(facts, policy, memory)
        chosen = decision.chosen
        why = None if chosen is None else refusal(chosen)
        if chosen is None or why is None:
            return facts, decision
        facts = replace(facts, refused={**facts.refused, chosen.name: why})


@dataclass(frozen=True, slots=True)
class _View:
    """Outlooks as one look has them."""

    facts: GuardFacts
    policy: GuardPolicy
    memory: GuardMemory

    def __call__(self, measure: Measure, shift: float = 0.0, limit: float | None = None) -> Outlook | None:
        at, policy = self.facts.at, self.policy
        since = self.memory.since(at)
        return outlook(measure, at, policy.horizon, policy.window, since, shift=shift, limit=limit)

    def avoided(self, measure: Measure, now: Outlook, *, shift: float = 0.0, limit: float | None = None) -> float:
        """Resource-seconds of contention that would not come."""
        after = self(measure, shift, limit) if now.contention > 0 else None
        return 0.0 if after is None else max(0.0, now.contention - after.contention)


def _pressed(known: Mapping[str, tuple[Measure, Outlook]], policy: GuardPolicy, memory: GuardMemory) -> dict[str, int]:
    """Looks in a row at which a resource was pressed: it is from the threshold on, until it is below the release."""
    found = {}
    for resource, (_, now) in known.items():
        before = memory.pressed.get(resource, 0)
        needed = policy.threshold * (policy.release if before else 1.0)
        if now.contention > 0 and now.contention >= needed:
            found[resource] = min(before + 1, policy.looks)
    return found


def _alternatives(allowed: Allowed, known: Mapping[str, tuple[Measure, Outlook]], view: _View) -> list[Alternative]:
    """One per resource that can grow, else one for the part."""
    cost = view.facts.costs.get(allowed.part, Cost(DEFAULT_COSTS[allowed.act]))
    refused = view.facts.refused.get(allowed.part)
    mine = [(m, now) for m, now in known.values() if not allowed.relieves or m.resource in allowed.relieves]
    if allowed.act is Act.GROW:
        return [_growth(allowed, m, now, cost, refused, view) for m, now in mine if m.most is not None]
    relieved = [(m, now, level) for m, now in mine if (level := _level_after(allowed, m, now)) is not None]
    benefit = sum(view.avoided(m, now, shift=min(0.0, level - now.level)) for m, now, level in relieved)
    lost = allowed.worth * cost.work
    if refused is None and not relieved:
        refused = "nobody knows that it would relieve anything"
    names = tuple(m.resource for m, _, _ in relieved)
    take = _take(allowed, cost, view.policy)
    paid, why = cost.pause + (take or 0.0) + lost, _why(cost, lost, take)
    return [Alternative(allowed.part, allowed.act, names, benefit, paid, why, None, refused)]


def _take(allowed: Allowed, cost: Cost, policy: GuardPolicy) -> float | None:
    """Seconds of pause for the snapshot that is taken first; None where none is."""
    if not (policy.snapshot_first and allowed.act.needs_snapshot):
        return None
    return DEFAULT_TAKE if cost.take is None else cost.take


def _level_after(allowed: Allowed, measure: Measure, now: Outlook) -> float | None:
    known = measure.after.get(allowed.part)
    if known is None and allowed.relief is not None and measure.resource in allowed.relieves:
        return now.level * (1 - allowed.relief)
    return known


def _growth(
    allowed: Allowed, measure: Measure, now: Outlook, cost: Cost, refused: str | None, view: _View
) -> Alternative:
    limit = min(measure.most or 0.0, measure.limit * (1 + view.policy.grow_by))
    refused = refused or view.facts.refused.get(f"grow:{measure.resource}")
    if refused is None and limit <= measure.limit:
        refused = "it cannot have more"
    benefit = view.avoided(measure, now, limit=max(limit, measure.limit))
    return Alternative(
        allowed.part, Act.GROW, (measure.resource,), benefit, cost.pause, _why(cost, 0.0, None), limit, refused
    )


def _why(cost: Cost, lost: float, take: float | None) -> str:
    pause = f"median of {cost.measured} on this VM" if cost.measured else "default: none was measured on this VM"
    kept = f"median of {cost.taken} on this VM" if cost.taken else "default: none was taken of this VM"
    first = "" if take is None else f"pause for a snapshot first {take:.2f} s ({kept}), "
    return f"pause {cost.pause:.2f} s ({pause}), {first}work lost counts {lost:.0f} s"


def _words(resources: Sequence[str] | Mapping[str, int]) -> str:
    names = ", ".join(sorted(resources))
    return f"{names} run out" if len(resources) > 1 else f"{names} runs out"
