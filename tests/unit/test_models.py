"""Models: trained in a child with limits, loaded only if their card vouches for them, silent rather than late."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.command import FakeSite

from hvctl import codec
from hvctl.adapters.models import boosters, seriesfile
from hvctl.adapters.models.boosters import Boosters, Silence
from hvctl.adapters.models.boostertraining import Lesson, train
from hvctl.adapters.models.modelstore import SHIPPED, ModelStore, shipped_folder
from hvctl.errors import DeadlineError, Exit, HvctlError, NotFoundError, RefusedError
from hvctl.forecasting.arbiter import Standing
from hvctl.forecasting.features import FEATURES, feature_hash
from hvctl.forecasting.forecast import forecast
from hvctl.model.forecast import Level, Metric, ModelCard
from hvctl.operations import model as verbs
from hvctl.settings import Settings
from unit.commandline import runner
from unit.fleets import fleet

TREES = {"trees": 8, "learning_rate": 0.2, "num_leaves": 7, "min_data_in_leaf": 20}
X = np.random.default_rng(2).normal(size=(1500, len(FEATURES))).astype(np.float32)
Y = (X[:, 4] * 2 + np.random.default_rng(3).exponential(size=1500)).astype(np.float32)
KEYS = ("cpu-peak-0.5", "cpu-peak-0.95")


def lessons(pricing: float = 0.0) -> list[Lesson]:
    return [Lesson(key, "cpu", Y, np.ones(1500, np.float32), float(key[9:]), pricing, TREES) for key in KEYS]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    heard: list[str] = []
    trained = train({"cpu": X}, lessons(), seconds=100, progress=heard.append)
    assert [line.split(":")[0] for line in heard] == list(KEYS)
    return {key: t.text for key, t in trained.items()}


def card(name: str = "one", made: str = "2026-01-01T00:00:00Z") -> ModelCard:
    return ModelCard(name, made, "fleet", 1, 1.0, 1500, feature_hash(), len(FEATURES), {}, {})


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(state_dir=str(tmp_path / "state"))


@pytest.fixture
def store(settings: Settings, texts: dict[str, str]) -> ModelStore:
    found = ModelStore(settings)
    found.add(card(), texts)
    return found


def test_quantiles_were_learned(texts: dict[str, str]) -> None:
    models = Boosters.of(card(), texts)
    for key, level in zip(KEYS, (0.5, 0.95), strict=True):
        told = models.predict(key, X, 60)
        assert isinstance(told, np.ndarray)
        assert float((told >= Y).mean()) == pytest.approx(level, abs=0.04)
    gains = models.gains(KEYS[0])
    assert max(gains, key=lambda n: gains[n]) == FEATURES[4]
    assert sum(gains.values()) == pytest.approx(1)


def test_the_same_arrays_give_the_same_text(texts: dict[str, str]) -> None:
    again = train({"cpu": X}, lessons()[:1], seconds=100)
    assert again[KEYS[0]].text == texts[KEYS[0]]
    # What an error costs is part of the lesson.
    assert train({"cpu": X}, lessons(0.5)[:1], seconds=100)[KEYS[0]].text != texts[KEYS[0]]


def test_a_training_that_takes_too_long_or_too_much_is_ended() -> None:
    with pytest.raises(DeadlineError):
        train({"cpu": X}, lessons(), seconds=0.05)
    with pytest.raises(HvctlError, match="status"):
        train({"cpu": X}, lessons(), seconds=100, memory=60 << 20)


def test_a_set_is_kept_with_its_digests(store: ModelStore, texts: dict[str, str]) -> None:
    found = store.card("one")
    assert found.files == {key: boosters.digest(text.encode()) for key, text in texts.items()}
    assert isinstance(store.open("one").predict(KEYS[0], X[:3], 10), np.ndarray)
    assert not list(store.folder("one").parent.glob(".new-*"))
    with pytest.raises(RefusedError, match="already"):
        store.add(card(), texts)


def test_a_changed_file_is_refused(store: ModelStore) -> None:
    path = store.folder("one") / f"{KEYS[1]}.txt"
    text = path.read_text()
    path.write_text(text.replace("leaf_value=", "leaf_value=9", 1))
    with pytest.raises(RefusedError, match="not the one that its card names"):
        store.open("one")
    path.unlink()
    with pytest.raises(RefusedError, match="cannot be read"):
        store.open("one")


def test_another_list_of_features_is_refused(store: ModelStore, texts: dict[str, str], monkeypatch: Any) -> None:
    path = store.folder("one") / "card.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "features": "0" * 64}))
    with pytest.raises(RefusedError, match="other features"):
        store.open("one")
    # The card may lie; the model's own names do not.
    lying = {key: text.replace(FEATURES[0], "horizons") for key, text in texts.items()}
    with pytest.raises(RefusedError, match="other features"):
        Boosters.of(card(), lying)


def test_what_is_no_model_is_refused(store: ModelStore, texts: dict[str, str]) -> None:
    store.add(card("two"), {KEYS[0]: "tree\nthis is none\n"})
    with pytest.raises(RefusedError, match="none that LightGBM reads"):
        store.promote("two")
    for rows in (2, 300):
        said = store.open("two").predict(KEYS[0], X[:rows], 60)
        assert isinstance(said, Silence)
        assert KEYS[0] in said.reason
    (store.folder("one") / "card.json").write_text("{}")
    with pytest.raises(RefusedError, match="cannot be read"):
        store.card("one")
    assert "one" not in [c.id for c in store.cards()]
    for name in ("three", "../one", ""):
        with pytest.raises(NotFoundError):
            store.card(name)


def test_forecasts_go_on_with_rules_whatever_becomes_of_the_model(
    store: ModelStore, settings: Settings, monkeypatch: Any
) -> None:
    monkeypatch.setattr(verbs, "PATIENCE", 60.0)  # a busy machine is another test's matter
    series = fleet(3, 2, resources=("cpu",))
    won = {f"cpu-{t}": Standing(0.5, 1.0, 9999, 99, True) for t in ("peak", "mean")}
    store.promote("one")
    folder = store.folder("one")

    def answers() -> tuple[set[str], set[str]]:
        found = forecast(series, verbs.panel(settings, won))
        return {f.answered.value for f in found}, {f.reason for f in found}

    # The set has no part for the mean, so a peak is the model's.
    assert answers()[0] == {"model"}
    assert {f.model for f in forecast(series, verbs.panel(settings, won))} == {"one"}
    assert {f.answered.value for f in forecast(series, verbs.panel(settings))} == {"baseline"}
    path = folder / f"{KEYS[1]}.txt"
    text = path.read_text()
    path.write_text(text + " ")
    for spoil, said in (
        (lambda: None, "not the one that its card names"),
        (path.unlink, "cannot be read"),
        (lambda: _spoil(folder / "card.json", features="0"), "other features"),
        (lambda: _spoil(folder / "card.json", rulebook={"cpu": {"x": ["a", "b", 1.0]}}), "rule book"),
        (lambda: (folder / "card.json").write_text("?"), "cannot be read"),
        ((folder / "card.json").unlink, "there is no model"),
    ):
        spoil()
        who, why = answers()
        assert who == {"baseline"}
        assert all(said in reason for reason in why), why


def _spoil(path: Path, **changed: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


class Slow:
    """A model that answers when it is told to."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def predict(self, x: Any) -> Any:
        self.go.wait(60)
        return np.zeros(len(x))


def test_a_slow_model_is_silence_in_time_and_holds_up_nobody() -> None:
    slow = Slow()
    models = Boosters(card(), {"k": slow})
    began = time.monotonic()
    first = models.predict("k", X[:1], 0.05)
    second = models.predict("k", X[:1], 60)
    assert isinstance(first, Silence)
    assert "within" in first.reason
    assert isinstance(second, Silence)
    assert "busy" in second.reason
    assert time.monotonic() - began < 30  # it did not wait for the model, which waits for a minute
    slow.go.set()
    for thread in threading.enumerate():
        if thread.name == "boosters":
            thread.join(60)
    assert isinstance(models.predict("k", X[:1], 60), np.ndarray)


def test_one_answer_waits_for_all_models_together(monkeypatch: Any) -> None:
    class Late:
        def predict(self, x: Any) -> Any:
            clock.now += 0.06
            return np.zeros(len(x))

    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(boosters, "time", clock)
    ask = Boosters(card(), {"a": Late(), "b": Late()}).within(0.1)
    assert isinstance(ask("a", X[:1]), np.ndarray)
    clock.now += 5.0  # what others take meanwhile does not count
    assert isinstance(ask("b", X[:1]), np.ndarray)
    late = ask("a", X[:1])
    assert isinstance(late, Silence)
    again = Boosters(card(), {"a": Late()}).within(0.1)
    assert isinstance(again("a", X[:1]), np.ndarray)


FRESH = """
import sys
import numpy as np
from hvctl.forecasting.arbiter import Standing
from hvctl.forecasting.forecast import forecast
from hvctl.forecasting.series import Series
from hvctl.operations.model import panel
from hvctl.settings import Settings
values = np.ones((1, 2016), np.float32)
won = {"cpu-peak": Standing(model=True), "cpu-mean": Standing(model=True)}
from dataclasses import replace
(line,) = forecast(
    Series(("a",), 0, {"cpu": values}), replace(panel(Settings(), won), patience=60.0), quantiles=(0.95,)
)
print(line.answered.value, line.mean_answered.value, "lightgbm" in sys.modules)
"""


def test_a_fresh_process_has_the_shipped_models_answer_without_loading_lightgbm() -> None:
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["model", "model", "False"]


def test_a_model_that_fails_or_answers_nonsense_is_silence() -> None:
    class Broken:
        def predict(self, x: Any) -> Any:
            raise OSError

    class Nonsense:
        def predict(self, x: Any) -> Any:
            return np.full(len(x), np.nan)

    models = Boosters(card(), {"broken": Broken(), "nonsense": Nonsense()})
    for key in ("broken", "nonsense", "missing"):
        assert isinstance(models.predict(key, X[:2], 10), Silence)
    assert isinstance(models.predict("broken", X[:2, :5], 10), Silence)


def test_promotion_and_going_back(store: ModelStore, texts: dict[str, str]) -> None:
    store.add(card("two", "2026-02-01T00:00:00Z"), texts)
    assert store.current() == SHIPPED
    assert store.promote("one") == SHIPPED
    assert store.promote("two") == "one"
    assert store.promote("two") == "two"
    assert store.current() == "two"
    assert store.rollback(dry_run=True) == "one"
    assert store.current() == "two"
    assert store.rollback() == "one"
    (store.folder("two") / f"{KEYS[0]}.txt").write_text("")
    with pytest.raises(RefusedError):
        store.promote("two")
    assert store.current() == "one"
    (store.folder("one").parent / "current.json").write_text("rubbish")
    assert store.current() == SHIPPED
    with pytest.raises(RefusedError, match="no model to go back to"):
        store.rollback()


def metric(pinball: float, gain: float) -> Metric:
    return Metric("cpu", "peak60", pinball, "last times 1", 1.0, gain, (gain, gain), gain, 0.95)


@pytest.mark.parametrize(
    ("new", "old", "refusal"),
    [
        (metric(0.8, 0.2), metric(0.9, 0.1), None),
        (metric(0.9, 0.1), metric(0.8, 0.2), "not better than shipped"),
        (metric(1.1, -0.1), metric(1.3, -0.3), "not better than the rules"),
        (metric(0.8, 0.2), None, None),
    ],
)
def test_only_what_is_better_is_promoted(
    settings: Settings, store: ModelStore, monkeypatch: Any, new: Metric, old: Metric | None, refusal: str | None
) -> None:
    def evaluate(settings: Settings, data: Path, name: str | None = None) -> list[Metric]:
        if name == "one":
            return [new]
        if old is None:
            raise NotFoundError("there is no such model.")
        return [old]

    monkeypatch.setattr(verbs, "evaluate", evaluate)
    if refusal is None:
        verbs.promote(settings, "one", Path("data"), dry_run=True)
        assert store.current() == SHIPPED
        verbs.promote(settings, "one", Path("data"))
        assert store.current() == "one"
    else:
        with pytest.raises(RefusedError, match=refusal):
            verbs.promote(settings, "one", Path("data"))
        assert store.current() == SHIPPED


def test_a_card_says_where_it_does_not_win() -> None:
    lost, unsure, won = metric(1.1, -0.1), replace(metric(0.9, 0.1), interval=(-0.1, 0.3)), metric(0.8, 0.2)
    mixed = replace(won, gain_composite=-0.05)
    spreads = {
        f"model-{r}-peak": (Level(0.5, 0, 0, 0.4), Level(0.99, 1, 0.5, c)) for r, c in (("cpu", 0.95), ("disk", 0.98))
    }
    said = "\n".join(verbs.limits(replace(card(), spreads=spreads), [lost, unsure, won, mixed]))
    assert "model cpu peak: the 0.99 quantile covered 95.0% of cases" in said
    assert "disk" not in said
    assert "loses 10% to last times 1" in said
    assert "not sure" in said
    assert "loses 5% to the best rule of each length" in said
    assert "few" in said


def test_the_commands(site: FakeSite, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Trains on a small fleet, through the command line, and goes all the way."""
    run = runner(site, monkeypatch, capsys)
    data = tmp_path / "fleet.parquet"
    seriesfile.write(data, fleet(24, 6, resources=("cpu",)))
    for name, value in {"trees": 5, "num_leaves": 7}.items():
        monkeypatch.setitem(verbs.PARAMETERS, name, value)
    trained = run("--format", "json", "model", "train", "--data", str(data), "--rows", "2000", "--seconds", "100")
    assert trained.status == 0, trained.err
    assert [m["target"] for m in json.loads(trained.out)["metrics"]] == ["peak60", "mean60"]
    listed = json.loads(run("-f", "json", "model", "list").out)["models"]
    name = listed[-1]["name"]
    assert name in trained.err
    shown = run("model", "show", name)
    assert "below about 30" in shown.out
    assert "cpu peak60" in run("-f", "table", "model", "show", name).out
    judged = run("model", "evaluate", "--data", str(data), name)
    assert "peak60" in judged.out
    assert run("model", "evaluate", "--data", str(tmp_path / "none.parquet")).status == Exit.NOT_FOUND
    monkeypatch.setattr(verbs, "evaluate", lambda *a: [metric(0.9, 0.1) if a[-1] == name else metric(1.0, 0.0)])
    assert run("model", "promote", name, "--data", str(data), "--dry-run").status == 0
    assert run("model", "promote", name, "--data", str(data)).status == 0
    assert name in [m["name"] for m in json.loads(run("-f", "json", "model", "list").out)["models"] if m["current"]]
    for again in ("would be", "is"):
        dry = ("--dry-run",) if again == "would be" else ()
        assert f"model shipped: {again} in use again" in run("model", "rollback", *dry).err
    gone = run("model", "show", "nothing")
    assert (gone.status, "hvctl model list" in gone.err) == (Exit.NOT_FOUND, True)


def test_the_shipped_models_answer_as_they_did() -> None:
    """Golden: rows of fixed numbers, and what the shipped models said about them when they were made."""
    golden = json.loads((Path(__file__).parent.parent / "golden" / "forecasts.json").read_text())
    store = ModelStore(Settings())
    models = store.open(SHIPPED)
    assert set(golden) == set(models.card.files)
    x = np.random.default_rng(11).normal(0, 1.5, (5, len(FEATURES))).astype(np.float32)
    for key, wanted in golden.items():
        told = models.predict(key, x, 60)
        assert isinstance(told, np.ndarray)
        np.testing.assert_allclose(told, wanted, rtol=1e-5, atol=1e-6)


def test_the_shipped_card_is_whole() -> None:
    found = codec.load_json(ModelCard, (shipped_folder() / "card.json").read_bytes())
    assert found.features == feature_hash()
    assert {m.resource for m in found.metrics} == {"cpu", "memory", "disk", "network"}
    assert found.limits
    assert sum((shipped_folder() / f"{key}.txt").stat().st_size for key in found.files) < 8 << 20
