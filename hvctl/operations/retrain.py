"""The node trains a model on its own record, and uses it if it beats both the one in use and the best rules. With a
small or short record a model only equals the rules, so then nothing is trained."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Final

import numpy as np

from hvctl.adapters.models import seriesfile
from hvctl.engine.operate import Engine
from hvctl.errors import RefusedError
from hvctl.operations import model as models
from hvctl.operations.series import history

ENOUGH_VMS: Final = 30
ENOUGH_DAYS: Final = 3
LONGEST: Final = 30 * 86400.0
"""Seconds of the record that a model is trained on: demand of long ago tells little, and must fit into memory."""
FEWEST_ROWS: Final = 20_000
SLOTS_OF_A_DAY: Final = 288


def retrain(engine: Engine) -> str:
    """What was done. The record that was trained on stays in the state directory, for `hvctl model promote --data`."""
    settings = engine.settings
    _, cards = models.listed(settings)
    newest = max((datetime.fromisoformat(c.created_at).timestamp() for c in cards if c.data == _FILE), default=0.0)
    # A daemon that starts anew runs every job.
    if engine.clock() - newest < settings.retrain_interval / 2:
        return "the newest model is too young"
    series = history(engine, seconds=min(LONGEST, settings.rolled_days * 86400))
    seen = np.zeros((len(series.vms), series.slots), np.bool_)
    for values in series.values.values():
        seen |= np.isfinite(values)
    vms = int((seen.sum(axis=1) >= SLOTS_OF_A_DAY).sum())
    first = int(seen.any(axis=0).argmax()) if seen.any() else series.slots
    days = (series.slots - first) / SLOTS_OF_A_DAY
    if vms < ENOUGH_VMS or days < ENOUGH_DAYS:
        return (
            f"too little record: {vms} VMs that were measured for a day, over {days:.1f} days; "
            f"{ENOUGH_VMS} VMs and {ENOUGH_DAYS} days are needed"
        )
    path = Path(settings.state_dir) / _FILE
    seriesfile.write(path, series)
    # Of a small fleet there are not that many different cases.
    rows = max(FEWEST_ROWS, min(models.ROWS, int(seen.sum())))
    card = models.train(settings, path, engine.progress, rows=rows)
    try:
        models.promote(settings, card.id, path)
    except RefusedError as e:
        return f"{card.id} was trained and is not in use: {e.message}"
    return f"{card.id} was trained and is in use"


_FILE: Final = "record.parquet"
