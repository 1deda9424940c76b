"""A forecast as the node keeps it, with what the model and the rule said, until it is known what came; and what was
learned of it: who is to answer, and how much is added to what each says."""

from __future__ import annotations

from typing import NamedTuple


class Prediction(NamedTuple):
    """Peak and mean demand of one resource of one VM over `horizon` seconds from made_at (seconds since 1970), in the
    units of forecasts; below both with the probability `quantile`.

    rule names who answered the peak (a model or a rule), answered is model.forecast.Answerer's value. model is the set
    of models that was in use, model_peak and model_mean what it said (None: it said nothing), rule_peak and rule_mean
    what the best rule said, each with its margin of that time. scale is what losses are divided by. actual_peak and
    actual_mean are what came; None: nobody knows yet.
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
    model_mean: float | None = None
    rule_mean: float | None = None
    actual_mean: float | None = None


class Recorded(NamedTuple):
    """The arbiter's record of one resource and target (peak or mean): forecasting.arbiter.Standing's fields, the model
    that it is of, and the made_at of the newest forecasts that were learned from."""

    resource: str
    target: str
    model_name: str
    model_loss: float
    rule_loss: float
    cases: int
    vms: int
    model: bool
    learned_at: int


class FleetMargin(NamedTuple):
    """What is added, as a logarithm, to everything that one answerer (model.forecast.Answerer's value) says of a
    resource and target while a set of models ("": none) is in use, and how often what it said was enough: covered of
    recent cases, both decayed; cases is their whole number. learned_at as in Recorded."""

    model_name: str
    answered: str
    resource: str
    target: str
    level: float
    cases: int
    recent: float
    covered: float
    learned_at: int


class VmMargin(NamedTuple):
    """What is added beside it for one VM, from `seen` cases of that VM's own."""

    model_name: str
    answered: str
    resource: str
    target: str
    vm_uuid: str
    level: float
    seen: int
    learned_at: int
