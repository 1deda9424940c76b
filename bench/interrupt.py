"""Which VMs give their resources back: how long the choice takes, how far from the cheapest it is, and what it saves.

Beside it, on the same hosts: every combination of VMs (what CERN's aardvark tries, there for the least left over),
where that ends, and the lowest priorities first. `make bench-interrupt`."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from report import say, write

from hvctl.decide.victims import Weights, cost_of
from hvctl.model.allocation import Resources
from hvctl.packing.choose import cheapest_cover
from hvctl.packing.cover import COUNTED, Candidate, covers

GIB = 1 << 30
SEED = 20261126
SIZES = ((100, 1), (100, 2), (200, 4), (200, 8), (400, 8), (400, 16), (800, 32))
ROUNDS = 25
SMALL_CASES = 40
EACH = 14  # 2 ** 14 combinations a host


@dataclass(frozen=True)
class Fleet:
    """VMs with their priorities, and what each host lacks for the same demand."""

    candidates: list[Candidate]
    priority: dict[str, int]
    lacking: dict[str, Resources]


def fleet(chance: random.Random, hosts: int, each: int) -> Fleet:
    candidates, priority = [], {}
    for host in range(hosts):
        for number in range(each):
            cpu, memory = chance.choice(SIZES)
            key = f"vm-{host}-{number}"
            priority[key] = chance.choice((100, 300, 500, 500, 500, 700, 900))
            weights = Weights(
                priority=priority[key],
                restart=chance.lognormvariate(3, 0.8),
                lost=chance.expovariate(1 / 7200) * chance.choice((0, 1)),
                available=min(1.0, chance.uniform(0.3, 1.5)),
            )
            gives = Resources(cpu, memory * GIB, chance.choice((0, 10**7, 10**8)), chance.choice((0, 500, 2000)))
            candidates.append(Candidate(key, f"host-{host}", cost_of(weights), gives))
    need = Resources(chance.choice((800, 1200)), chance.choice((24, 40)) * GIB, 5 * 10**7, 1000)
    lacking = {}
    for host in range(hosts):
        free = chance.uniform(0.0, 0.6)
        lacking[f"host-{host}"] = Resources(*(int(getattr(need, n) * (1 - free)) for n in COUNTED))
    return Fleet(candidates, priority, lacking)


def by_host(case: Fleet) -> dict[str, list[Candidate]]:
    groups: dict[str, list[Candidate]] = {host: [] for host in case.lacking}
    for candidate in case.candidates:
        groups[candidate.host].append(candidate)
    return groups


def price(chosen: Sequence[Candidate]) -> float:
    return sum(c.cost for c in chosen)


def every_combination(case: Fleet) -> tuple[float | None, float | None]:
    """Cost of the cheapest cover, and of the one that leaves the least over (aardvark's `strict`), of all there are."""
    cheapest, strict, least = None, None, None
    for host, group in by_host(case).items():
        need = case.lacking[host]
        for size in range(1, len(group) + 1):
            for chosen in itertools.combinations(group, size):
                if not covers((c.gives for c in chosen), need):
                    continue
                cost = price(chosen)
                total = sum((c.gives for c in chosen), Resources())
                left = sum(getattr(total, n) / getattr(need, n) for n in COUNTED if getattr(need, n))
                cheapest = cost if cheapest is None else min(cheapest, cost)
                if least is None or left < least:
                    strict, least = cost, left
    return cheapest, strict


def lowest_priority_first(case: Fleet) -> float | None:
    """On each host the VMs in the order of their priority until the need fits; the host whose victims have the lowest
    priorities."""
    best: tuple[tuple[int, int], float] | None = None
    for host, group in by_host(case).items():
        chosen: list[Candidate] = []
        for candidate in sorted(group, key=lambda c: (case.priority[c.key], c.key)):
            if covers((c.gives for c in chosen), case.lacking[host]):
                break
            chosen.append(candidate)
        if covers((c.gives for c in chosen), case.lacking[host]):
            worth = (max(case.priority[c.key] for c in chosen), sum(case.priority[c.key] for c in chosen))
            if best is None or worth < best[0]:
                best = (worth, price(chosen))
    return best and best[1]


def main() -> None:
    chance = random.Random(SEED)
    cases: list[dict[str, Any]] = []
    warm = fleet(random.Random(SEED), 4, 20)
    cheapest_cover(warm.candidates, warm.lacking, tolerance=0.0)  # loads the solver
    seconds, gains = [], []
    for number in range(ROUNDS):
        case = fleet(chance, 500, 20)
        began = time.perf_counter()
        cover = cheapest_cover(case.candidates, case.lacking)
        seconds.append(time.perf_counter() - began)
        exact = cheapest_cover(case.candidates, case.lacking, tolerance=0.0)
        other = lowest_priority_first(case)
        assert cover is not None
        assert exact is not None
        assert other is not None
        gains.append(1 - cover.cost / other)
        cases.append({"vms": 10_000, "hosts": 500, "round": number, "seconds": seconds[-1], "gap": cover.gap,
                      "to_exact": cover.cost / exact.cost - 1, "gain_vs_lowest_priority": gains[-1],
                      "victims": len(cover.keys)})  # fmt: skip
        say(f"10,000 VMs: {seconds[-1]:.3f} s, at most {cover.gap:.2%} above the cheapest, {gains[-1]:.0%} gained")
    gaps = [c["to_exact"] for c in cases]
    ratios, over_strict = [], []
    for number in range(SMALL_CASES):
        case = fleet(chance, 2, EACH if number < 6 else 9)
        began = time.perf_counter()
        cheapest, strict = every_combination(case)
        exhaustive = time.perf_counter() - began
        began = time.perf_counter()
        cover = cheapest_cover(case.candidates, case.lacking)
        mine = time.perf_counter() - began
        assert (cover is None) == (cheapest is None)
        if cover is None or cheapest is None or strict is None:
            continue
        gaps.append(max(0.0, cover.cost / cheapest - 1))
        ratios.append(exhaustive / mine)
        over_strict.append(1 - cover.cost / strict)
        cases.append({"vms": len(case.candidates), "hosts": 2, "seconds": mine, "seconds_exhaustive": exhaustive,
                      "to_exact": gaps[-1], "gain_vs_least_left_over": over_strict[-1]})  # fmt: skip
    say(f"beside every combination: {statistics.median(ratios[:6]):.0f} times faster with {EACH} VMs a host")
    write(
        "interrupt",
        {
            "seconds_10k_vms": statistics.median(seconds),
            "gap_to_optimum": max(gaps),
            "gain_vs_lowest_priority": statistics.median(gains),
            "gain_vs_least_left_over": statistics.median(over_strict),
            "times_faster_than_every_combination": statistics.median(ratios[:6]),
        },
        cases,
    )


if __name__ == "__main__":
    main()
