"""lightgbm's one door: trains in a child process with limits, loads only what a card vouches for, and answers within a
time or not at all. Models are text; what does not answer is a value, so that the caller goes on with a rule."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hvctl.errors import RefusedError
from hvctl.forecasting.features import FEATURES, feature_hash
from hvctl.forecasting.series import F32
from hvctl.model.forecast import ModelCard

if TYPE_CHECKING:
    import lightgbm

_CHUNK: Final = 2048  # rows between two looks at the clock
_LARGEST: Final = 64 << 20  # bytes of one model's text


@dataclass(frozen=True, slots=True)
class Silence:
    """No answer from a model, and why; the baseline answers."""

    reason: str


class Boosters:
    """The loaded models of one card. One thread asks them, so a slow one blocks nobody: while it is still at work,
    further questions get Silence at once."""

    def __init__(self, card: ModelCard, models: Mapping[str, lightgbm.Booster]) -> None:
        self.card = card
        self._models = models
        self._busy = threading.Lock()

    @classmethod
    def of(cls, card: ModelCard, texts: Mapping[str, str]) -> Boosters:
        """Of models that were trained just now, before they have files."""
        return cls(card, {key: _booster(key, text.encode()) for key, text in texts.items()})

    def predict(self, key: str, x: F32, seconds: float) -> F32 | Silence:
        """[rows]: the logarithmic ratio to each row's base. seconds is the whole time that the caller waits."""
        model = self._models.get(key)
        if model is None:
            return Silence(f"the model {self.card.id} has no part {key}")
        if x.shape[1] != len(FEATURES):
            return Silence(f"{x.shape[1]} features were given, the model knows {len(FEATURES)}")
        if not self._busy.acquire(blocking=False):
            return Silence("the model is still busy with a question that it did not answer in time")
        end = time.monotonic() + seconds
        answer: list[F32 | Silence] = []
        done = threading.Event()

        def work() -> None:
            try:
                answer.append(_in_chunks(model, x, end))
            finally:
                self._busy.release()
                done.set()

        threading.Thread(target=work, daemon=True, name="boosters").start()
        if not done.wait(max(0.0, end - time.monotonic())) or not answer:
            return Silence(f"the model did not answer within {seconds:g} s")
        return answer[0]

    def gains(self, key: str) -> dict[str, float]:
        """How much each feature lowered the loss in training, as a share of all."""
        gain = self._models[key].feature_importance("gain")
        return {name: float(g) for name, g in zip(FEATURES, gain / max(float(gain.sum()), 1e-30), strict=True)}


def _in_chunks(model: lightgbm.Booster, x: F32, end: float) -> F32 | Silence:
    parts: list[Any] = []
    try:
        for at in range(0, len(x), _CHUNK):
            if time.monotonic() > end:
                return Silence("the model is too slow for so many rows")
            parts.append(model.predict(x[at : at + _CHUNK], num_threads=1))
    except Exception as e:  # whatever a library says about a model, a rule can still answer
        return Silence(f"the model failed: {type(e).__name__}")
    found = np.concatenate(parts).astype(np.float32) if parts else np.empty(0, np.float32)
    return found if np.isfinite(found).all() else Silence("the model answered what is no number")


def digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def load(card: ModelCard, folder: Path) -> Boosters:
    """RefusedError for another list of features, and for a file that is missing, changed, or no model."""
    if card.features != feature_hash():
        raise RefusedError(
            f"the model {card.id} was trained on other features than this hvctl computes.",
            "train it: hvctl model train",
        )
    texts = {}
    for key, wanted in card.files.items():
        path = folder / f"{key}.txt"
        try:
            if path.stat().st_size > _LARGEST:
                raise RefusedError(f"the model file {path} is larger than any model.", "hvctl model rollback")
            text = path.read_bytes()
        except OSError as e:
            raise RefusedError(f"the model file {path} cannot be read: {e.strerror}.", "hvctl model rollback") from e
        if digest(text) != wanted:
            raise RefusedError(f"the model file {path} is not the one that its card names.", "hvctl model rollback")
        texts[key] = text
    return Boosters(card, {key: _booster(key, text) for key, text in texts.items()})


def _booster(key: str, text: bytes) -> lightgbm.Booster:
    import lightgbm

    try:
        model = lightgbm.Booster(model_str=text.decode())
    except (lightgbm.basic.LightGBMError, ValueError) as e:
        raise RefusedError(f"the model {key} is none that LightGBM reads.", "train it: hvctl model train") from e
    if tuple(model.feature_name()) != FEATURES:
        raise RefusedError(f"the model {key} names other features.", "train it: hvctl model train")
    return model
