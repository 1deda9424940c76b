"""lightgbm's one door: loads only what a card vouches for, and answers within a time or not at all. Models are text;
what does not answer is a value, so that the caller goes on with a rule. The trees themselves answer for few rows:
LightGBM takes longer to load than anybody waits who asks about one VM."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from hvctl.errors import RefusedError
from hvctl.forecasting.features import FEATURES, feature_hash
from hvctl.forecasting.series import F32
from hvctl.forecasting.trees import Trees, gains, read_trees
from hvctl.model.forecast import ModelCard

if TYPE_CHECKING:
    import lightgbm

_CHUNK: Final = 2048  # rows between two looks at the clock
_FEW: Final = 256  # rows up to which the trees answer; of more, LightGBM is several times faster
_LARGEST: Final = 64 << 20  # bytes of one model's text


@dataclass(frozen=True, slots=True)
class Silence:
    """No answer from a model, and why; the baseline answers."""

    reason: str


class Part(Protocol):
    """One model. RefusedError for what is none."""

    def predict(self, x: F32) -> Any: ...


@dataclass(frozen=True, slots=True)
class Text:
    """A model as its file says it; what is made of it is kept for the next who asks, however it was loaded."""

    key: str
    text: bytes

    def predict(self, x: F32) -> Any:
        return (_trees if len(x) <= _FEW else _booster)(self.key, self.text).predict(x)

    def gains(self) -> dict[str, float]:
        return gains(self.text.decode())


class Boosters:
    """The models of one card, each read when it is first asked. One thread asks them, so a slow one blocks nobody:
    while it is still at work, further questions get Silence at once."""

    def __init__(self, card: ModelCard, models: Mapping[str, Part]) -> None:
        self.card = card
        self._models = models
        self._busy = threading.Lock()

    @classmethod
    def of(cls, card: ModelCard, texts: Mapping[str, str]) -> Boosters:
        """Of models that were trained just now, before they have files; RefusedError as `check`."""
        found = cls(card, {key: Text(key, text.encode()) for key, text in texts.items()})
        found.check()
        return found

    def check(self) -> None:
        """Read all of them, in both ways; RefusedError for what is no model, or one of other features."""
        for key, model in self._models.items():
            if isinstance(model, Text):
                _booster(key, model.text)
                _trees(key, model.text)

    def within(self, seconds: float) -> Callable[[str, F32], F32 | Silence]:
        """What asks as `predict` does; all that is asked through it waits no longer than this in all."""
        left = seconds

        def ask(key: str, x: F32) -> F32 | Silence:
            nonlocal left
            began = time.monotonic()
            try:
                return self.predict(key, x, left)
            finally:
                left -= time.monotonic() - began

        return ask

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
            return Silence(f"the model did not answer within {max(seconds, 0.0):.2g} s")
        return answer[0]

    def gains(self, key: str) -> dict[str, float]:
        """How much each feature lowered the loss in training, as a share of all."""
        model = self._models[key]
        found = model.gains() if isinstance(model, Text) else {}
        total = max(sum(found.values()), 1e-30)
        return {name: found.get(name, 0.0) / total for name in FEATURES}


def _in_chunks(model: Part, x: F32, end: float) -> F32 | Silence:
    parts: list[Any] = []
    try:
        for at in range(0, len(x), _CHUNK):
            if time.monotonic() > end:
                return Silence("the model is too slow for so many rows")
            parts.append(model.predict(x[at : at + _CHUNK]))
    except RefusedError as e:
        return Silence(e.message)
    except Exception as e:  # whatever a library says about a model, a rule can still answer
        return Silence(f"the model failed: {type(e).__name__}")
    found = np.concatenate(parts).astype(np.float32) if parts else np.empty(0, np.float32)
    return found if np.isfinite(found).all() else Silence("the model answered what is no number")


def digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def load(card: ModelCard, folder: Path) -> Boosters:
    """RefusedError for another list of features, and for a file that is missing or changed."""
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
    return Boosters(card, {key: Text(key, text) for key, text in texts.items()})


@dataclass(frozen=True, slots=True)
class _Booster:
    model: lightgbm.Booster

    def predict(self, x: F32) -> Any:
        return self.model.predict(x, num_threads=1)


# A daemon loads the same set again for each round.
@lru_cache(maxsize=32)
def _trees(key: str, text: bytes) -> Trees:
    try:
        trees = read_trees(text.decode())
    except ValueError as e:
        raise RefusedError(f"the model {key} cannot be read: {e}.", "train it: hvctl model train") from e
    if trees.names != FEATURES:
        raise RefusedError(f"the model {key} names other features.", "train it: hvctl model train")
    return trees


@lru_cache(maxsize=32)
def _booster(key: str, text: bytes) -> _Booster:
    import lightgbm

    try:
        model = lightgbm.Booster(model_str=text.decode())
    except (lightgbm.basic.LightGBMError, ValueError) as e:
        raise RefusedError(f"the model {key} is none that LightGBM reads.", "train it: hvctl model train") from e
    if tuple(model.feature_name()) != FEATURES:
        raise RefusedError(f"the model {key} names other features.", "train it: hvctl model train")
    return _Booster(model)
