"""Forecasts, what came of them and who has won, on both databases."""

from __future__ import annotations

from hvctl.adapters.store import Store
from hvctl.model.prediction import Prediction, Recorded
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
    store.forecasts.come(HOST, [ONE._replace(actual_peak=2.5)])
    came = {(p.made_at, p.vm_uuid, p.resource): p.actual_peak for p in store.forecasts.made(HOST, 0, 4000)}
    assert came.pop((3000, "u1", "cpu")) == 2.5
    assert set(came.values()) == {None}
    assert store.forecasts.made("other", 0, 4000) == [ONE]
    assert store.forecasts.prune(HOST, 3000) == 3
    assert [p.made_at for p in store.forecasts.made(HOST, 0, 4000)] == [3300]


def test_a_standing_replaces_the_one_before(store: Store) -> None:
    cpu = Recorded("cpu", "m1", 0.5, 1.0, 300, 12, True, 3000)
    memory = cpu._replace(resource="memory", model=False)
    store.forecasts.stand(HOST, [cpu, memory])
    store.forecasts.stand("other", [cpu._replace(cases=1)])
    new = cpu._replace(model_name="m2", cases=301, learned_at=6600)
    store.forecasts.stand(HOST, [new])
    assert store.forecasts.standings(HOST) == {"cpu": new, "memory": memory}
