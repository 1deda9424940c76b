"""A guard of a VM: what its policy allows, what it sees, and what it decided. All plain values, so that the journal
keeps them, and whoever replays a trace makes them of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Act(StrEnum):
    """What a guard can do, the gentlest first."""

    GROW = "grow"
    CACHE = "cache"
    NET = "net"
    RAM = "ram"
    DISK = "disk"
    WHOLE = "whole"

    @property
    def needs_snapshot(self) -> bool:
        return self in (Act.RAM, Act.DISK, Act.WHOLE)


@dataclass(frozen=True, slots=True)
class Allowed:
    """One thing that a policy allows. part: grow, cache, net, whole, or disk:NAME, ram:BASE-END as `hvctl reset --only`
    takes them. worth: what a second of the work that goes with it counts, 0 to 1. relieves: the resources that it is
    for (none named: all that it is known to relieve); relief: the share of what they use that it takes away, where only
    the operator knows. before and after: the guest's hooks."""

    part: str
    worth: float = 1.0
    relieves: tuple[str, ...] = ()
    relief: float | None = None
    before: tuple[tuple[str, ...], ...] = ()
    after: tuple[tuple[str, ...], ...] = ()

    @property
    def act(self) -> Act:
        """ValueError for what is no part."""
        return Act(self.part.partition(":")[0])


@dataclass(frozen=True, slots=True)
class GuardPolicy:
    """Times in seconds, sizes in bytes. to: the snapshot that parts go back to.

    It acts when the contention that it would avoid within `horizon`, less what that costs, is `threshold` or more in
    resource-seconds, at `looks` looks in a row; a resource stays pressed until its contention is below `release` times
    the threshold. window: how far back a trend looks. After an action nothing is done for cool_down.
    grow_by: the share by which an allocation grows. disk_full: the share of its size at which a disk counts as full,
    since a file system needs some of it. resident: what the VM's process may hold of the host's memory; connections:
    how many the host may track for it. snapshot_first: what is about to be reset is kept before, for `keep` seconds,
    and the pause for that counts.
    """

    description: str
    allow: tuple[Allowed, ...]
    to: str | None = None
    threshold: float = 60.0
    release: float = 0.5
    looks: int = 2
    horizon: float = 1800.0
    window: float = 600.0
    cool_down: float = 600.0
    grow_by: float = 0.25
    disk_full: float = 0.9
    resident: int | None = None
    connections: int | None = None
    snapshot_first: bool = False
    keep: float = 900.0


@dataclass(frozen=True, slots=True)
class Watch:
    """What arms a guard, in a VM's record: the policy as it was read, and by what name."""

    name: str
    policy: GuardPolicy


Points = tuple[tuple[float, float], ...]
"""(seconds since 1970, value), in the order of time."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One resource of a VM. points: what the host measured; claimed: what the guest says of the same, which can only
    make it look less pressed. limit and most: what it has, and how far that may be raised (None: not at all).

    quantiles: (share, value) of the forecast peak, none if nobody forecasts. after: by part, the level right after a
    reset of it; a part that is not there would change nothing that is known.
    """

    resource: str
    unit: str
    points: Points
    limit: float
    claimed: Points = ()
    most: float | None = None
    quantiles: tuple[tuple[float, float], ...] = ()
    after: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a reset of a part took on this VM, in seconds that it was paused or away; measured: the median of so many, 0
    for a stated default. work: the seconds of work that it would throw away. take: seconds that it was paused for a
    snapshot, the median of so many (taken); None while none was taken."""

    pause: float
    measured: int = 0
    work: float = 0.0
    take: float | None = None
    taken: int = 0


@dataclass(frozen=True, slots=True)
class GuardFacts:
    """What a decision goes by. at: seconds since 1970. refused: by part (or grow:RESOURCE), why it cannot be
    done now."""

    vm: str
    at: float
    measures: tuple[Measure, ...]
    costs: Mapping[str, Cost] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GuardMemory:
    """What a guard keeps from one look to the next. pressed: by resource, at how many looks in a row it was."""

    pressed: Mapping[str, int] = field(default_factory=dict)
    acted_at: float | None = None
    acted: str | None = None

    def since(self, at: float) -> float | None:
        """When it acted last; None if it never did, or in a future that only a clock which was set back has."""
        return None if self.acted_at is None or self.acted_at > at else self.acted_at


@dataclass(frozen=True, slots=True)
class GuardState:
    """What is kept of one guarded VM. looks: by resource, what earlier looks saw that no sample has (disks)."""

    memory: GuardMemory = field(default_factory=GuardMemory)
    looks: Mapping[str, Points] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outlook:
    """When a resource runs out: in `eta` seconds (None: nobody can say), within the horizon with this probability.
    contention: seconds within the horizon for which it is expected to be exhausted. rate: units per second."""

    resource: str
    unit: str
    level: float
    limit: float
    rate: float | None
    eta: float | None
    probability: float
    contention: float
    by: str


@dataclass(frozen=True, slots=True)
class Alternative:
    """One answer, and what it is worth: benefit is contention avoided in resource-seconds, cost is pause (that for what
    is kept before, too) and work lost in seconds, score the difference. limit: what the resource that grows would have.
    refused: why it cannot be done."""

    part: str
    act: Act
    resources: tuple[str, ...]
    benefit: float
    cost: float
    why: str
    limit: float | None = None
    refused: str | None = None

    @property
    def score(self) -> float:
        return self.benefit - self.cost

    @property
    def name(self) -> str:
        """Of several that grow, which."""
        return f"{self.part}:{self.resources[0]}" if self.act is Act.GROW else self.part


class Verdict(StrEnum):
    """What a decision comes to."""

    ACTS = "acts"
    QUIET = "nothing runs out"
    UNSEEN = "too little was seen"
    FIRST_LOOK = "looked at again"
    COOLING = "cooling down"
    UNABLE = "nothing can be done"
    NOT_WORTH = "not worth its cost"


@dataclass(frozen=True, slots=True)
class GuardDecision:
    """chosen None: nothing is done, and reason says why. alternatives: every one, the best first. memory: what the
    guard keeps for its next look."""

    verdict: Verdict
    chosen: Alternative | None
    reason: str
    outlooks: tuple[Outlook, ...]
    alternatives: tuple[Alternative, ...]
    memory: GuardMemory

    @property
    def contention(self) -> float:
        """Of the resource that is pressed most, in seconds."""
        return max((o.contention for o in self.outlooks), default=0.0)


@dataclass(frozen=True, slots=True)
class Decided:
    """A row of the journal: one decision, or a run of the same "nothing" from `at` to `until`, of so many `looks`.

    facts, before (the guard's memory) and decision are those of the newest look; most is the largest contention of any
    look of the run, in seconds, at most_at. outcome and operation: what came of an action. kept_until: until when what
    was reset is kept for undo. Times are seconds since 1970.
    """

    vm_uuid: str
    vm_name: str
    at: float
    until: float
    watch: Watch
    facts: GuardFacts
    before: GuardMemory
    decision: GuardDecision
    looks: int = 1
    most: float = 0.0
    most_at: float = 0.0
    id: int = 0
    operation: int | None = None
    outcome: str | None = None
    kept_until: float | None = None

    @property
    def kept(self) -> str:
        """The name of the snapshot that is taken before it acts."""
        return f"guard-{self.id}"
