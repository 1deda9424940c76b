"""Trees that are read from LightGBM's text: what LightGBM says to the last bit, and an error for what is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightgbm
import numpy as np
import pytest

from hvctl.adapters.models.boosterchild import slim
from hvctl.adapters.models.modelstore import shipped_folder
from hvctl.forecasting.series import F32
from hvctl.forecasting.trees import gains, read_trees

RNG = np.random.default_rng(6)
ALWAYS = {"verbosity": -1, "num_threads": 1, "deterministic": True, "force_row_wise": True}


def rows(count: int, features: int, missing: float) -> F32:
    x = RNG.normal(0, 1.5, (count, features)).astype(np.float32)
    x[RNG.random(x.shape) < missing] = np.nan
    return x


def trained(x: F32, trees: int = 7, **more: Any) -> lightgbm.Booster:
    y = np.nan_to_num(x[:, 0]) * 2 + np.isnan(x[:, 1]) + RNG.normal(0, 0.1, len(x))
    return lightgbm.train({**ALWAYS, "num_leaves": 9, "min_data_in_leaf": 5, **more}, lightgbm.Dataset(x, y), trees)


def test_the_shipped_models_are_read_as_lightgbm_reads_them() -> None:
    x = rows(600, 71, 0.1)
    for key in ("cpu-peak-0.95", "network-mean-0.5"):
        text = (shipped_folder() / f"{key}.txt").read_text()
        booster = lightgbm.Booster(model_str=text)
        trees = read_trees(text)
        np.testing.assert_array_equal(trees.predict(x), booster.predict(x, num_threads=1).astype(np.float32))
        assert list(trees.names) == booster.feature_name()
        np.testing.assert_allclose(list(gains(text).values()), booster.feature_importance("gain"), rtol=1e-4)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_what_is_missing_goes_where_it_went_in_training(missing: float) -> None:
    """Where training knew no NaN, it is read as 0."""
    booster = trained(rows(800, 4, missing))
    x = rows(300, 4, 0.4)
    x[:20] = 0
    told = read_trees(slim(booster.model_to_string())).predict(x)
    np.testing.assert_array_equal(told, booster.predict(x, num_threads=1).astype(np.float32))


def test_a_tree_that_never_splits() -> None:
    booster = trained(rows(30, 3, 0.0), 2, min_data_in_leaf=30)
    trees = read_trees(slim(booster.model_to_string()))
    assert trees.depth == 0
    np.testing.assert_array_equal(trees.predict(rows(2, 3, 0)), booster.predict(rows(2, 3, 0)).astype(np.float32))


def _line(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"{name}="))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: "tree\nthis is none\n",
        lambda t: t[: len(t) // 2],
        lambda t: t.replace("num_leaves=9", "num_leaves=8", 1),
        lambda t: t.replace(_line(t, "decision_type"), "decision_type=" + "1 " * 8, 1),
        lambda t: t.replace(_line(t, "split_feature"), "split_feature=" + "4 " * 8, 1),
        lambda t: t.replace(_line(t, "left_child"), "left_child=" + "0 " * 8, 1),
        lambda t: t.replace(_line(t, "left_child"), "left_child=" + "-10 " * 8, 1),
        lambda t: t.replace(_line(t, "threshold"), "threshold=" + "much " * 8, 1),
    ],
)
def test_what_is_no_model_is_an_error(spoil: Callable[[str], str]) -> None:
    text = slim(trained(rows(800, 4, 0.1)).model_to_string())
    read_trees(text)
    with pytest.raises(ValueError, match=r"."):
        read_trees(spoil(text))
