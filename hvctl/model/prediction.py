"""A forecast as the node keeps it, with what the model and the rule said, until it is known what came; and the record
of one resource from which the arbiter chooses."""

from __future__ import annotations

from typing import NamedTuple


class Prediction(NamedTuple):
    """Peak and mean demand of one resource of one VM over `horizon` seconds from made_at (seconds since 1970), in the
    units of forecasts; below both with the probability `quantile`.

    rule names who answered (a model or a rule), answered is model.forecast.Answerer's value. model is the set of models
    that was in use, model_peak what it said (None: it said nothing), rule_peak what the best rule said. scale is what
    losses are divided by. actual_peak is what came; None: nobody knows yet.
    """

    made_at: int
    vm_uuid: str
    resource: str
    horizon: int
    quantile: float
    peak: float
    mean: float
    rule: str
    answered: str
    model: str | None
    model_peak: float | None
    rule_peak: float
    scale: float
    actual_peak: float | None = None


class Recorded(NamedTuple):
    """The arbiter's record of one resource: forecasting.arbiter.Standing's fields, the model that it is of, and the
    made_at of the newest forecasts that were learned from."""

    resource: str
    model_name: str
    model_loss: float
    rule_loss: float
    cases: int
    vms: int
    model: bool
    learned_at: int
