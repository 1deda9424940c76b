"""pool show, pool set, and reservations: room that is held for somebody, and what holding it was worth."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import asdict, fields, replace
from typing import Any

from hvctl.decide.admission import FORMAT, holders
from hvctl.decide.pool import lines, used_by
from hvctl.decide.reservations import Wanted, hit_rates, in_force, new_reservation, settled
from hvctl.engine.handover import capacity, limited, room_for
from hvctl.engine.iops import lately
from hvctl.engine.observe import balloon_of, observe_all
from hvctl.engine.operate import Engine
from hvctl.errors import RefusedError, UsageError
from hvctl.model.allocation import Resources
from hvctl.model.host import Ledger
from hvctl.model.pool import Held, Limits, Reservation
from hvctl.model.vm import Vm

FOREVER_TEXT = "until it is released"


# --- the pool


def show(engine: Engine) -> list[dict[str, Any]]:
    """One row per resource. Reservations are looked at on the way: what decayed goes back, what was used is noted."""
    vms, used = follow(engine)
    ledger = engine.store.ledger(engine.facts.name)
    held = holders(ledger, vms)
    needs = [engine.needs(vm, 0.0) for vm in vms if vm.state.active]
    forecast = sum((n.resources for n in needs), Resources())
    settings = limited(engine.settings, engine.store.pool.limits(engine.facts.name))
    known = {n for use in used.values() for n in use if use[n] is not None}
    totals = {n: sum(use.get(n) or 0 for use in used.values()) for n in known}
    return [asdict(line) for line in lines(engine.facts, settings, held, ledger, totals, forecast, engine.clock())]


def observed_use(engine: Engine, vms: tuple[Vm, ...]) -> dict[str, dict[str, int | None]]:
    """By uuid, of what runs: CPU and network as the kernel counts them, memory as the guest reports it, IOPS as in the
    newest sample (None without one). A guest that does not report is taken to use all that it has."""
    from hvctl.adapters.kernel.hostuse import uses

    counted, iops = uses(vms), lately(engine)
    found: dict[str, dict[str, int | None]] = {}
    for vm in vms:
        if not vm.state.active:
            continue
        balloon = balloon_of(engine.host, vm)
        memory = balloon.actual - (balloon.usable or 0) if balloon.reported else balloon.actual
        use = counted.get(vm.uuid)
        found[vm.uuid] = {
            "cpu": use.cpu if use else None,
            "memory": memory,
            "network": use.network if use else None,
            "iops": iops[vm.uuid][-1] if vm.uuid in iops else None,
        }
    return found


def limits(engine: Engine) -> Limits:
    return engine.store.pool.limits(engine.facts.name)


def set_limits(engine: Engine, changed: Limits, unset: Set[str] = frozenset()) -> Limits:
    """Change what is named; the fields in `unset` are the settings' again. Nobody loses what was promised before, even
    where it is more than there then is."""
    now = limits(engine)
    given = {f.name: v for f in fields(changed) if (v := getattr(changed, f.name)) is not None}
    new = replace(now, **given, **dict.fromkeys(unset))
    for name in ("cpu_overcommit", "memory_overcommit"):
        ratio = getattr(new, name)
        if ratio is not None and not 0 < ratio <= 100:
            raise UsageError(f"an overcommit of {ratio:g} is outside 0 to 100.", "1 promises what there is")
    engine.store.pool.set_limits(engine.facts.name, new)
    return new


# --- reservations


def fresh(engine: Engine, wanted: Wanted, state: Held = Held.HELD) -> Reservation:
    return new_reservation(wanted, engine.clock(), engine.who, state)


def reserve(engine: Engine, wanted: Wanted, *, key: str | None = None, dry_run: bool = False) -> Reservation:
    """All of it or nothing: RefusedError tells what lacks."""
    if not wanted.size.any:
        raise UsageError("a reservation of nothing.", "name --cpu, --memory, --net or --iops")
    if wanted.ends_at is not None and wanted.ends_at <= max(wanted.starts_at, engine.clock()):
        raise UsageError("a reservation that ends before it begins.", "--for is how long it lasts")
    most, observed = capacity(engine), observe_all(engine.host)

    def grant(ledger: Ledger, one: Reservation) -> Resources:
        got = room_for(engine, most, observed, ledger, one)
        if (lacking := one.size - got).any:
            words = ", ".join(f"{n} lacks {text(v)}" for n, text in FORMAT.items() if (v := getattr(lacking, n)))
            raise RefusedError(f"it does not fit on this host: {words}.", "hvctl pool show; hvctl reserve list")
        return got

    new = fresh(engine, wanted)
    if dry_run:
        return replace(new, granted=grant(engine.store.ledger(engine.facts.name), new))
    (made,) = engine.store.pool.reserve(engine.facts.name, (new,), grant, key)
    same_request(made, new.owner, new.size)
    return made


def same_request(made: Reservation, owner: str, size: Resources) -> None:
    """RefusedError if this reservation, which a key led to, is not what was asked for."""
    if (made.owner, made.size) != (owner, size):
        words = ", ".join(text(v) for n, text in FORMAT.items() if (v := getattr(made.size, n)))
        raise RefusedError(f"this key was used for reservation {made.id} of {made.owner}: {words}.", "use a new --key")


def release(engine: Engine, number: int) -> Reservation:
    """End it; ended already is fine. What was used of it up to now is noted."""
    vms = observe_all(engine.host)
    used = _resources(observed_use(engine, vms))
    now = engine.clock()

    def edit(one: Reservation, ledger: Ledger) -> Reservation:
        if one.state is Held.ENDED:
            return one
        looked = settled(one, used_by(one.owner, holders(ledger, vms), used), now)
        return replace(looked, state=Held.ENDED, closed_at=now)

    return engine.store.pool.change(engine.facts.name, number, edit)


def reservations(engine: Engine, *, ended: bool = False) -> list[dict[str, Any]]:
    """Each with what it keeps now and, of what it kept so far, the share that was used."""
    follow(engine)
    return [described(r, engine.clock()) for r in engine.store.pool.reservations(engine.facts.name, ended=ended)]


def described(one: Reservation, now: float) -> dict[str, Any]:
    from hvctl import codec

    data: dict[str, Any] = codec.dump(one)
    rates = hit_rates(one)
    data["kept"] = asdict(in_force(one, now))
    data["hit"] = rates
    data["wasted"] = {n: 1 - rate for n, rate in rates.items()}
    return data


def follow(engine: Engine) -> tuple[tuple[Vm, ...], dict[str, dict[str, int | None]]]:
    """Look at every reservation: what of it is used, what decayed, which have ended. To be called now and then; the VMs
    as they are, and what each uses."""
    vms = observe_all(engine.host)
    used = observed_use(engine, vms)
    now, by_vm = engine.clock(), _resources(used)
    for one in engine.store.pool.reservations(engine.facts.name):

        def edit(current: Reservation, ledger: Ledger) -> Reservation:
            looked = settled(current, used_by(current.owner, holders(ledger, vms), by_vm), now)
            over = looked.ends_at is not None and looked.ends_at <= now
            return replace(looked, state=Held.ENDED, closed_at=now) if over else looked

        engine.store.pool.change(engine.facts.name, one.id, edit)
    return vms, used


def _resources(used: dict[str, dict[str, int | None]]) -> dict[str, Resources]:
    return {u: Resources(**{name: value or 0 for name, value in use.items()}) for u, use in used.items()}
