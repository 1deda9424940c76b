"""The child that trains: reads arrays and lessons from a folder, writes one text file a model, and one line of JSON on
stdout when each is done."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Final

import lightgbm
import numpy as np

from hvctl.forecasting.features import FEATURES

_ALWAYS: Final[dict[str, Any]] = {
    "objective": "quantile",
    "metric": "None",
    "num_threads": 1,
    "seed": 1,
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}
_FIRST: Final[dict[str, Any]] = {"learning_rate": 0.15, "num_leaves": 15}
_FIRST_TREES: Final = 30
# The file loads without these, which are two fifths of it and serve no prediction.
_UNUSED: Final = (
    "tree_sizes=",
    "leaf_weight=",
    "leaf_count=",
    "internal_value=",
    "internal_weight=",
    "internal_count=",
)


def main(folder: Path) -> None:
    shared: dict[str, Any] = {}
    for order in json.loads((folder / "lessons.json").read_text()):
        began = time.monotonic()
        name = order["features"]
        if name not in shared:
            shared = {name: _bins(np.load(folder / f"{name}.x.npy", allow_pickle=False), order["parameters"])}
        y, size = np.load(folder / f"{order['key']}.y.npy", allow_pickle=False)
        text, trees = _train(shared[name], y, size, order)
        (folder / f"{order['key']}.txt").write_text(text)
        told = {"key": order["key"], "trees": trees, "seconds": time.monotonic() - began}
        print(json.dumps(told), flush=True)


def _bins(x: Any, parameters: dict[str, Any]) -> tuple[Any, Any]:
    """The histogram bins are made once for all models of a resource; the matrix stays for its predictions."""
    chosen = {**_ALWAYS, **_tree(parameters)}
    data = lightgbm.Dataset(x, np.zeros(len(x)), feature_name=list(FEATURES), params=chosen, free_raw_data=False)
    return data.construct(), x


def _tree(parameters: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in parameters.items() if k != "trees"}


def _train(data: tuple[Any, Any], y: Any, size: Any, order: dict[str, Any]) -> tuple[str, int]:
    binned, x = data
    chosen = {**_ALWAYS, **_tree(order["parameters"]), "alpha": order["quantile"]}
    binned.set_label(y)
    weight = np.ones_like(y)
    if order["pricing"] > 0:
        # An error costs what the forecast reserves there: a small first model tells about how much that is.
        binned.set_weight(weight)
        first = lightgbm.train({**chosen, **_FIRST}, binned, _FIRST_TREES)
        cost = size * np.exp(first.predict(x, num_threads=1))
        weight = np.clip(cost, 1e-4, 3.0) ** order["pricing"]
    binned.set_weight(weight / weight.mean())
    model = lightgbm.train(chosen, binned, int(order["parameters"]["trees"]))
    return slim(model.model_to_string(importance_type="gain")), int(model.num_trees())


def slim(text: str) -> str:
    """The same model without what only a further training would read."""
    head = text.partition("\npandas_categorical")[0].partition("\nparameters:")[0]
    return "\n".join(line for line in head.splitlines() if not line.startswith(_UNUSED)) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
