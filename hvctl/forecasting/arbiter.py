"""Who may answer for a resource: the rule, until the model has had the lower loss on this fleet's own recent record.
A model that was made elsewhere can be a fifth worse than a rule, so it has to win here first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

MEMORY: Final = 4000.0  # cases after which an old one weighs 1/e
MIN_CASES: Final = 300  # before the model may answer at all
MIN_VMS: Final = 10
WINS: Final = 0.96  # the model takes over below this ratio of losses ...
LOSES: Final = 1.0  # ... and the rule above this one


@dataclass(frozen=True, slots=True)
class Standing:
    """The record of one resource (and target): decayed sums of both losses, the cases behind them, and who answers."""

    model_loss: float = 0.0
    rule_loss: float = 0.0
    cases: int = 0
    vms: int = 0
    model: bool = False

    @property
    def ratio(self) -> float:
        """The model's loss over the rule's; 1 before there is any."""
        return self.model_loss / self.rule_loss if self.rule_loss > 0 else 1.0

    @property
    def reason(self) -> str:
        if self.cases < MIN_CASES or self.vms < MIN_VMS:
            return f"the model has not yet been compared often enough here ({self.cases} cases of {self.vms} VMs)"
        shown = f"the model's loss is {self.ratio:.2f} of the rule's on this fleet's last {self.cases} cases"
        return f"{shown}, {'low enough' if self.model else 'not low enough'} to answer"


def learn(standing: Standing, model_loss: float, rule_loss: float, cases: int, vms: int) -> Standing:
    """After `cases` more outcomes with these mean losses; vms: how many VMs have been compared so far in all."""
    if cases <= 0:
        return standing
    kept = 2.718281828 ** (-cases / MEMORY)
    new = replace(
        standing,
        model_loss=standing.model_loss * kept + model_loss * cases,
        rule_loss=standing.rule_loss * kept + rule_loss * cases,
        cases=standing.cases + cases,
        vms=max(standing.vms, vms),
    )
    if new.cases < MIN_CASES or new.vms < MIN_VMS or new.rule_loss <= 0:
        return replace(new, model=False)
    # Between the two bounds whoever answers goes on: nobody is helped by an answer that changes with every sample.
    return replace(new, model=new.ratio < (LOSES if standing.model else WINS))
