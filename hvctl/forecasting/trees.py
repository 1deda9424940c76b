"""The trees of a LightGBM model, read from its text and asked with numpy alone: the same answer to the last bit,
without the third of a second that it takes to load LightGBM, which is what few rows need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from hvctl.forecasting.series import F32, F64, I64, Flags

_CATEGORICAL: Final = 1
_DEFAULT_LEFT: Final = 2
_MISSING: Final = 3  # bits 2 and 3 of a decision: what counts as missing
_NAN: Final = 2
_ROWS: Final = 256


@dataclass(frozen=True, slots=True)
class Trees:
    """The inner nodes of all trees, then the leaves of all trees; a leaf's children are itself.

    feature, threshold, nan_left, left and right: [nodes]; a value that is not above the threshold goes left, NaN as
    nan_left says. value: [nodes], 0 for an inner node. roots: [trees]. depth: the most steps from a root to a leaf.
    """

    names: tuple[str, ...]
    roots: I64
    feature: I64
    threshold: F64
    nan_left: Flags
    left: I64
    right: I64
    value: F64
    depth: int

    def predict(self, x: F32) -> F32:
        """[rows]; x: [rows, features]."""
        found = np.empty(len(x), np.float32)
        for at in range(0, len(x), _ROWS):
            part = x[at : at + _ROWS]
            rows = np.arange(len(part))[:, None]
            node: I64 = np.broadcast_to(self.roots, (len(part), len(self.roots)))
            for _ in range(self.depth):
                seen = part[rows, self.feature[node]]
                below = np.where(np.isnan(seen), self.nan_left[node], seen <= self.threshold[node])
                node = np.where(below, self.left[node], self.right[node])
            # In the order of the trees, as LightGBM adds: another order rounds otherwise.
            found[at : at + _ROWS] = np.cumsum(self.value[node], axis=1)[:, -1]
        return found


def read_trees(text: str) -> Trees:
    """ValueError for what is no model, or one with splits that are not of numbers."""
    fields = _fields(text)

    def floats(name: str) -> F64:
        return np.array(list(map(float, " ".join(fields.get(name, ())).split())), np.float64)

    def integers(name: str) -> I64:
        return np.array(list(map(int, " ".join(fields.get(name, ())).split())), np.int64)

    names = tuple(" ".join(fields.get("feature_names", ())).split())
    leaves = integers("num_leaves")
    inner = leaves - 1
    count, ends = int(inner.sum()), int(leaves.sum())
    value, threshold = floats("leaf_value"), floats("threshold")
    feature, decision = integers("split_feature"), integers("decision_type")
    below, above = integers("left_child"), integers("right_child")
    if not len(leaves) or len(value) != ends or any(
        len(found) != count for found in (feature, threshold, decision, below, above)
    ):  # fmt: skip
        raise ValueError("it is not whole")
    if ((decision & _CATEGORICAL) > 0).any() or ((feature < 0) | (feature >= len(names))).any():
        raise ValueError("a split is not by a feature that is a number")
    first, first_leaf = np.cumsum(inner) - inner, count + np.cumsum(leaves) - leaves
    own = np.arange(count + ends)

    def children(of: I64) -> I64:
        """A tree numbers its nodes from 0 and its leaves from -1 down."""
        tree = np.repeat(np.arange(len(leaves)), inner)
        if ((of >= inner[tree]) | (of < -leaves[tree])).any():
            raise ValueError("a split leads nowhere")
        return np.concatenate([np.where(of < 0, first_leaf[tree] - 1 - of, first[tree] + of), own[count:]])

    left, right = children(below), children(above)
    roots = np.where(inner > 0, first, first_leaf)
    # Where NaN is not what counts as missing, it is read as 0.
    nan_left = np.where(decision >> 2 & _MISSING == _NAN, decision & _DEFAULT_LEFT > 0, threshold >= 0)

    def nodes(found: F64 | I64 | Flags) -> F64:
        return np.concatenate([found, np.zeros(ends)])

    return Trees(
        names,
        roots,
        nodes(feature).astype(np.int64),
        nodes(threshold),
        nodes(nan_left).astype(np.bool_),
        left,
        right,
        np.concatenate([np.zeros(count), value]),
        _depth(roots, left, right, count),
    )


def gains(text: str) -> dict[str, float]:
    """What the splits by each feature gained in training."""
    fields = _fields(text)
    found = dict.fromkeys(" ".join(fields["feature_names"]).split(), 0.0)
    names = list(found)
    features, gained = (" ".join(fields.get(n, ())).split() for n in ("split_feature", "split_gain"))
    for feature, gain in zip(features, gained, strict=True):
        found[names[int(feature)]] += float(gain)
    return found


def _fields(text: str) -> dict[str, list[str]]:
    """By name, the values of each tree."""
    found: dict[str, list[str]] = {}
    for line in text.partition("\nend of trees")[0].splitlines():
        name, _, values = line.partition("=")
        found.setdefault(name, []).append(values)
    return found


def _depth(roots: I64, left: I64, right: I64, inner: int) -> int:
    """Steps after which every path has come to a leaf; ValueError for a tree that goes round."""
    at, steps = roots[roots < inner], 0
    while len(at):
        at = np.concatenate([left[at], right[at]])
        at, steps = at[at < inner], steps + 1
        if len(at) > inner:
            raise ValueError("a tree goes round")
    return steps
