"""One simulated host: what it promised to whom, what it keeps for whom, and who is away. It does what production's
decisions say, at once and without fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from hvctl.decide.admission import admit
from hvctl.decide.interrupt import Ask, Choose, Facts, Interruption, own_room, plan_interruption
from hvctl.decide.pool import used_by
from hvctl.decide.reservations import FOREVER, Wanted, beyond, grantable, new_reservation, room, settled
from hvctl.decide.returning import wanted_return
from hvctl.decide.victims import MIB, Seen, squeezed
from hvctl.model.allocation import Allocation, Record, Resources, resources
from hvctl.model.host import Capacity
from hvctl.model.plan import Refusal
from hvctl.model.pool import Away, Need, Reservation, Rung
from hvctl.model.vm import Accel, Balloon, State, Vm
from hvctl.replay.fleet import Member

MARGIN: Final = 32 * MIB
WHO: Final = "replay"


class Guest:
    """A VM on its host. away: it was interrupted. starts: it never ran yet, and is to. since: seconds since 1970 of its
    last start. late: it was due and did not fit."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.away: Away | None = None
        self.starts = False
        self.since = 0.0
        self.late = False
        self._allocation: Allocation | None = None
        self._promise = Resources()

    @property
    def allocation(self) -> Allocation | None:
        """What it is promised; None: it is not there, or holds nothing."""
        return self._allocation

    @allocation.setter
    def allocation(self, new: Allocation | None) -> None:
        self._allocation = new
        self._promise = Resources() if new is None else resources(new)

    @property
    def runs(self) -> bool:
        return self._allocation is not None and (self.away is None or self.away.rung is Rung.SQUEEZE)

    @property
    def record(self) -> Record:
        return self.promised(self.allocation or self.member.size)

    def promised(self, allocation: Allocation) -> Record:
        m = self.member
        return Record(allocation, protected=m.guaranteed, priority=m.priority, interruptible=not m.guaranteed)

    @property
    def holds(self) -> Resources:
        """Of its host; a paused one only its memory."""
        if self.away is not None and self.away.rung is Rung.PAUSE:
            return Resources(memory=self._promise.memory)
        return self._promise

    def vm(self, record: Record | None = None) -> Vm:
        """As hvctl observes it; record: as if it were promised something else."""
        state = State.RUNNING if self.runs else State.OFF if self.allocation is None else State.PAUSED
        promised = record or self.record
        m = self.member
        return Vm(
            m.uuid, m.name, state, "replay", Accel.KVM, True, None, self.allocation or promised.allocation,
            m.size.vcpus, m.size.memory, (), (), promised,
        )  # fmt: skip


class SimulatedHost:
    """used: what a VM used lately; need: what it is predicted to need, of a VM as it is given."""

    def __init__(
        self, capacity: Capacity, guests: list[Guest], used: Callable[[Guest], Resources],
        need: Callable[[Guest, Vm], Need],
    ) -> None:  # fmt: skip
        self.capacity = capacity
        self.guests = guests
        self.reservations: list[Reservation] = []
        self._by_uuid = {g.member.uuid: g for g in guests}
        self._used = used
        self._need = need
        self._numbers = 0

    def held(self) -> dict[str, tuple[str, Resources]]:
        return {g.member.uuid: (g.member.name, g.holds) for g in self.guests if g.allocation is not None}

    def kept(self, now: float) -> Resources:
        """What reservations keep on top of what their owners hold."""
        if not self.reservations:
            return Resources()
        return sum(beyond(self.reservations, self.held(), frozenset(), now).values(), Resources())

    def seen(self, guest: Guest, now: float, record: Record | None = None) -> Seen:
        """record: as if it were promised something else."""
        vm = guest.vm(record)
        has = vm.allocation
        balloon = Balloon(has.memory, has.memory, 0, max(0, has.memory - self._used(guest).memory), 0.0)
        return Seen(vm, guest.holds, self._need(guest, vm), balloon, now - guest.since, busy=guest.away is not None)

    def follow(self, now: float) -> None:
        """As production does each cycle: what decayed goes back, what has ended is gone."""
        if not self.reservations:
            return
        held = self.held()
        used = {g.member.uuid: self._used(g) for g in self.guests if g.runs}
        looked = (settled(r, used_by(r.owner, held, used), now) for r in self.reservations)
        self.reservations = [r for r in looked if r.ends_at is None or r.ends_at > now]

    def available(self) -> int:
        """Bytes of memory that nobody was seen to use."""
        return max(0, self.capacity.memory - sum(self._used(g).memory for g in self.guests if g.allocation is not None))

    def refusal(self, guest: Guest, want: Resources, now: float) -> Refusal | None:
        m = guest.member
        return admit(self.capacity, self.held(), m.uuid, want, self.reservations, m.name, now)

    def fits(self, guest: Guest, want: Resources, now: float) -> bool:
        return self.refusal(guest, want, now) is None

    def room(self, guest: Guest, now: float) -> Resources:
        """What it may have in all, from now on."""
        m = guest.member
        return room(self.capacity, self.held(), self.reservations, frozenset({m.uuid, m.name}), now).largest(
            guest.holds
        )

    def free(self, guest: Guest, want: Resources, now: float) -> Resources:
        """What of `want` it may have in all, what it has included."""
        m = guest.member
        got = own_room(self._facts(now), Ask(want, m.uuid), now, FOREVER)
        return want.least(got.largest(guest.holds))

    def _facts(self, now: float, seen: tuple[Seen, ...] = ()) -> Facts:
        return Facts(self.capacity, self.held(), self.reservations, seen, MARGIN, now)

    def reserve(self, wanted: Wanted, now: float) -> Reservation:
        """As much as there is room for."""
        one = new_reservation(wanted, now, WHO)
        names = {g.member.uuid: g.member.name for g in self.guests}
        granted = grantable(self.capacity, self.held(), self.reservations, one, names, now)
        self._numbers += 1
        made = replace(one, id=self._numbers, granted=granted)
        self.reservations.append(made)
        return made

    def end(self, owner: str) -> None:
        """What was kept for somebody's return."""
        self.reservations = [r for r in self.reservations if r.owner != owner]

    def plan(self, guest: Guest, ask: Ask, now: float, choose: Choose) -> Interruption | Refusal:
        """Of those below it: the guaranteed are above all, then the higher priorities."""
        below = (g for g in self.guests if g.allocation is not None and rank(g) > rank(guest))
        seen = tuple(self.seen(g, now) for g in below if not g.member.guaranteed)
        return plan_interruption(self._facts(now, seen), ask, choose)

    def interrupt(
        self,
        plan: Interruption,
        ask: Ask,
        now: float,
        returns: Callable[[Guest, Allocation], tuple[Allocation, Resources]],
    ) -> list[Guest]:
        """Neighbours shrink, room for the returns is kept, and the victims go: these. returns: of a victim and what it
        is predicted to need, what it comes back with and what is kept for that."""
        for shrink in plan.shrinks:
            self._by_uuid[shrink.seen.vm.uuid].allocation = shrink.to
        lacking = ask.need - own_room(self._facts(now), ask, now, FOREVER if ask.seconds is None else now + ask.seconds)
        went = []
        for turn in plan.turns:
            guest = self._by_uuid[turn.seen.vm.uuid]
            goal, kept = returns(guest, turn.goal)
            if kept.any:
                self.reserve(wanted_return(guest.member.uuid, kept, now + ask.back), now)
            left = squeezed(turn.seen, MARGIN, lacking) if turn.rung is Rung.SQUEEZE else turn.seen.record.allocation
            record = guest.record
            guest.away = Away(
                guest.member.uuid, guest.member.name, turn.rung, record, left, record.with_allocation(goal), now,
                now + ask.back, "replay", turn.seen.need.reason,
            )  # fmt: skip
            guest.allocation = None if turn.rung.ends_process else left
            lacking -= turn.gives
            went.append(guest)
        return went

    def come_back(self, guest: Guest, now: float) -> bool:
        """If it is due and fits: with what was worked out for it, inside its reservation."""
        away = guest.away
        if away is None or away.return_at > now:
            return False
        if not self.fits(guest, resources(away.goal.allocation), now):
            guest.late = True
            return False
        guest.allocation, guest.away, guest.late = away.goal.allocation, None, False
        if away.rung.ends_process:
            guest.since = now
        self.end(guest.member.uuid)
        return True


def rank(guest: Guest) -> tuple[bool, int]:
    """The lower, the more it counts."""
    return not guest.member.guaranteed, -guest.member.priority


def order(guest: Guest) -> tuple[tuple[bool, int], int]:
    """Who gets something first."""
    return rank(guest), guest.member.number
