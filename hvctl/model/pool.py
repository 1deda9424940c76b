"""Room of a host that is held for somebody: reservations, what they were worth, and VMs that are away meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from hvctl.model.allocation import Allocation, Record, Resources


class Held(StrEnum):
    """What a reservation is. waiting: it gets what VMs give back that are being interrupted for it. scheduled: that
    begins later, at its start. held: all of it counts. ended: none of it does."""

    WAITING = "waiting"
    SCHEDULED = "scheduled"
    HELD = "held"
    ENDED = "ended"


class Rung(StrEnum):
    """How a VM is interrupted, the gentlest first."""

    SQUEEZE = "squeeze"
    PAUSE = "pause"
    SAVE = "save"
    SHUTDOWN = "shutdown"
    POWER_OFF = "power-off"

    @property
    def ends_process(self) -> bool:
        return self in (Rung.SAVE, Rung.SHUTDOWN, Rung.POWER_OFF)

    @property
    def loses_work(self) -> bool:
        """Whether what the guest has in its RAM is gone."""
        return self in (Rung.SHUTDOWN, Rung.POWER_OFF)


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A VM that gives of what it `had`, so that a victim can come back."""

    vm_uuid: str
    had: Record
    to: Allocation


@dataclass(frozen=True, slots=True)
class Errand:
    """What is still to be done for a demand: the VMs to interrupt that are not off yet, with how, the next one first,
    and the neighbours that shrink for their return, until they are given back what they had. Victims come back `back`
    seconds after they went; grace is what each guest has, rungs are what may be done to it."""

    back: float
    grace: float
    rungs: tuple[Rung, ...]
    victims: tuple[tuple[str, Rung], ...] = ()
    neighbours: tuple[Neighbour, ...] = ()


@dataclass(frozen=True, slots=True)
class Reservation:
    """`granted` of `size` is kept from starts_at to ends_at (None: until it is released) for `owner`: a VM by uuid or
    name, or anything else. Times are seconds since 1970.

    half_life: in so many seconds half of what the owner does not use goes back, from idle_since on; None: nothing.
    used is what the owner used of it when that was last looked at. reserved_seconds and used_seconds add up what was
    held and what of it was used, over time, up to accounted_at. errand: VMs are interrupted for it. demand: it is kept
    for the return of one of these, and this is the number of the reservation that it went for."""

    id: int
    owner: str
    reason: str
    size: Resources
    granted: Resources
    state: Held
    starts_at: float
    ends_at: float | None
    half_life: float | None
    idle_since: float
    made_at: float
    who: str
    used: Resources = field(default_factory=Resources)
    reserved_seconds: dict[str, float] = field(default_factory=dict)
    used_seconds: dict[str, float] = field(default_factory=dict)
    accounted_at: float = 0.0
    errand: Errand | None = None
    demand: int | None = None
    key: str | None = None
    closed_at: float | None = None


@dataclass(frozen=True, slots=True)
class Away:
    """A VM that was interrupted and is to come back at return_at, with `goal`, inside the reservation `returns`.

    demand: the reservation that it was interrupted for. had is what it was promised before, left what it is promised
    meanwhile; forecast says where the goal comes from, predicted are the peaks that it goes by (Need.peaks)."""

    vm_uuid: str
    vm_name: str
    rung: Rung
    had: Record
    left: Allocation
    goal: Record
    out_at: float
    return_at: float
    reason: str
    forecast: str
    id: int = 0
    demand: int | None = None
    returns: int | None = None
    returned_at: float | None = None
    predicted: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Limits:
    """What was set for a host with `hvctl pool set`; None leaves it to the settings."""

    cpu_overcommit: float | None = None
    memory_overcommit: float | None = None
    reserve_cpus: int | None = None
    reserve_memory: int | None = None
    network_capacity: int | None = None
    iops_capacity: int | None = None


@dataclass(frozen=True, slots=True)
class Need:
    """What a VM is predicted to need, and who says so; known: a forecast does, so that less may be enough. peaks are
    the predicted peaks themselves, by resource in the units of forecasts, without what is added to them."""

    resources: Resources
    reason: str
    known: bool = False
    peaks: Mapping[str, float] = field(default_factory=dict)
