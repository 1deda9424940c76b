"""Forecasts, what came of them and who has won, on both databases."""

from __future__ import annotations

from hvctl.adapters.store.store import Store
from hvctl.model.prediction import FleetMargin, Prediction, Recorded, VmMargin
from tests.contract.stores import HOST, database_url, migrated_store  # noqa: F401
from tests.postgresql import postgresql_cluster  # noqa: F401

ONE = Prediction(3000, "u1", "cpu", 3600, 0.95, 1.5, 0.75, "max_1h", "baseline", None, None, 1.5, 4.0)
MODEL = ONE._replace(resource="memory", rule="m1", answered="model", model="m1", model_peak=1.25)


def test_what_is_written_is_read(store: Store) -> None:
    store.forecasts.add(HOST, [ONE, MODEL])
    store.forecasts.add("other", [ONE._replace(peak=9.0)])
    assert store.forecasts.made(HOST, 0, 4000) == [ONE, MODEL]
    assert store.forecasts.made(HOST, 3000, 4000) == store.forecasts.made(HOST, 0, 2999) == []
    assert store.forecasts.made(HOST, 0, 4000, "u2") == []


def test_what_was_said_first_stays(store: Store) -> None:
    store.forecasts.add(HOST, [ONE])
    store.forecasts.add(HOST, [ONE._replace(peak=9.0), MODEL])
    assert {p.peak for p in store.forecasts.made(HOST, 0, 4000)} == {1.5}
    store.forecasts.add(HOST, [])


def test_the_newest_are_those_of_one_time(store: Store) -> None:
    later = ONE._replace(made_at=3300)
    store.forecasts.add(HOST, [ONE, MODEL, later])
    assert store.forecasts.newest(HOST, 0, 5000) == [later]
    assert store.forecasts.newest(HOST, 0, 3299) == [ONE, MODEL]
    assert store.forecasts.newest(HOST, 3300, 5000) == []


def test_what_came_is_written_to_these_alone(store: Store) -> None:
    store.forecasts.add(HOST, [ONE, MODEL, ONE._replace(made_at=3300), ONE._replace(vm_uuid="u2")])
    store.forecasts.add("other", [ONE])
    store.forecasts.come(HOST, [ONE._replace(actual_peak=2.5, actual_mean=1.25)])
    came = {
        (p.made_at, p.vm_uuid, p.resource): (p.actual_peak, p.actual_mean) for p in store.forecasts.made(HOST, 0, 4000)
    }
    assert came.pop((3000, "u1", "cpu")) == (2.5, 1.25)
    assert set(came.values()) == {(None, None)}
    assert (3000, "u1", "cpu") not in {
        (p.made_at, p.vm_uuid, p.resource) for p in store.forecasts.made(HOST, 0, 4000, awaited=True)
    }
    assert len(store.forecasts.made(HOST, 0, 4000, awaited=True)) == 3
    assert store.forecasts.made("other", 0, 4000) == [ONE]
    assert store.forecasts.prune(HOST, 3000) == 3
    assert [p.made_at for p in store.forecasts.made(HOST, 0, 4000)] == [3300]


def test_a_standing_replaces_the_one_before(store: Store) -> None:
    cpu = Recorded("cpu", "peak", "m1", 0.5, 1.0, 300, 12, True, 3000)
    memory, mean = cpu._replace(resource="memory", model=False), cpu._replace(target="mean")
    store.forecasts.learn(HOST, [cpu, memory, mean], [], [])
    store.forecasts.learn("other", [cpu._replace(cases=1)], [], [])
    new = cpu._replace(model_name="m2", cases=301, learned_at=6600)
    store.forecasts.learn(HOST, [new], [], [])
    found = store.forecasts.standings(HOST)
    assert found == {("cpu", "peak"): new, ("memory", "peak"): memory, ("cpu", "mean"): mean}


def test_margins_are_kept_by_model_and_forgotten_when_nothing_is_learned(store: Store) -> None:
    fleet = FleetMargin("m1", "model", "cpu", "peak", 0.125, 300, 200.5, 190.25, 3000)
    own = VmMargin("m1", "model", "cpu", "peak", "u1", -0.25, 25, 3000)
    rule, other = own._replace(answered="baseline"), own._replace(vm_uuid="u2", learned_at=9000)
    store.forecasts.learn(HOST, [], [fleet, fleet._replace(model_name="m2", level=9.0)], [own, rule, other])
    store.forecasts.learn("other", [], [fleet._replace(level=5.0)], [])
    assert store.forecasts.fleet_margins(HOST, "m1") == [fleet]
    assert sorted(store.forecasts.vm_margins(HOST, "m1")) == sorted([own, rule, other])
    assert store.forecasts.vm_margins(HOST, "m1", ["u2"]) == [other]
    assert store.forecasts.vm_margins(HOST, "m2") == store.forecasts.vm_margins(HOST, "m1", []) == []
    new = own._replace(level=0.5, seen=26, learned_at=6600)
    store.forecasts.learn(HOST, [], [fleet._replace(level=0.0, learned_at=6600)], [new])
    assert store.forecasts.vm_margins(HOST, "m1", ["u1"]) == [rule, new]
    store.forecasts.forget(HOST, 3000)
    assert [f.level for f in store.forecasts.fleet_margins(HOST, "m1")] == [0.0]
    assert store.forecasts.fleet_margins(HOST, "m2") == []
    assert sorted(store.forecasts.vm_margins(HOST, "m1")) == sorted([new, other])
    assert [f.level for f in store.forecasts.fleet_margins("other", "m1")] == [5.0]
