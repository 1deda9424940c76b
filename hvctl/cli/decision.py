"""How a person reads a guard's decision: what runs out, what could be done about it, and what was."""

from __future__ import annotations

from typing import Any

from hvctl import codec
from hvctl.model.guard import Alternative, Decided, Outlook
from hvctl.units import format_duration, format_rate, format_size, format_time


def described(one: Decided) -> dict[str, Any]:
    """All of it as plain values, with what is worked out from them."""
    data: dict[str, Any] = codec.dump(one)
    for alternative, values in zip(one.decision.alternatives, data["decision"]["alternatives"], strict=True):
        values["score"] = alternative.score
    return data


def lines(one: Decided) -> list[tuple[str, str]]:
    """What `hvctl explain` and a dry run print."""
    decision = one.decision
    over = format_time(one.at)
    if one.looks > 1:
        over += f" to {format_time(one.until)}, {one.looks} looks; the newest one:"
    found = [
        ("decision", f"d{one.id} of {one.vm_name}" if one.id else f"of {one.vm_name}, were it armed"),
        ("at", over),
        ("policy", f"{one.watch.name}: {one.watch.policy.description}"),
        ("does", decision.chosen.name if decision.chosen else "nothing"),
        ("because", decision.reason),
    ]
    if one.looks > 1 and one.most > 0:
        found.append(("worst", f"{one.most:.0f} s of contention were expected at {format_time(one.most_at)}"))
    found += [("resource", _outlook(o)) for o in decision.outlooks]
    found += [("instead" if a != decision.chosen else "chosen", _alternative(a)) for a in decision.alternatives]
    if one.outcome:
        number = f", operation {one.operation}" if one.operation else ""
        found.append(("outcome", f"{one.outcome}{number}"))
    if one.kept_until is not None:
        found.append(("kept", f"{one.kept} until {format_time(one.kept_until)}: hvctl guard {one.vm_name} --undo"))
    return found


def exhaustion(outlook: Outlook) -> str:
    """When a resource runs out, and how likely that is."""
    if outlook.probability < 0.005:
        return "does not run out as far as can be seen"
    if outlook.eta == 0:
        return "is exhausted"
    when = "within the horizon" if outlook.eta is None else f"in {format_duration(max(0.0, outlook.eta))}"
    return f"runs out {when} ({outlook.probability:.0%})"


def _outlook(outlook: Outlook) -> str:
    now, limit = amount(outlook.level, outlook.unit), amount(outlook.limit, outlook.unit)
    rate = "" if not outlook.rate else f", {'+' if outlook.rate > 0 else '-'}{_rate(abs(outlook.rate), outlook.unit)}"
    expected = f"{outlook.contention:.0f} s of contention expected" if outlook.contention else "no contention expected"
    return f"{outlook.resource}: {now} of {limit}{rate}; {exhaustion(outlook)}; {expected} ({outlook.by})"


def _alternative(one: Alternative) -> str:
    if one.refused:
        return f"{one.name}: not possible: {one.refused}"
    return f"{one.name}: avoids {one.benefit:.0f} resource-seconds for {one.cost:.1f} s: {one.why}"


def amount(value: float, unit: str) -> str:
    match unit:
        case "bytes":
            return format_size(round(value))
        case "bytes/s":
            return f"{format_size(round(value))}/s"
        case "bit/s":
            return format_rate(round(value))
    return f"{value:.3g} {unit}"


def _rate(value: float, unit: str) -> str:
    return f"{amount(value, unit)} a second"
