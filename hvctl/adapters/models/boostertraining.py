"""Trains models in a child process that has limits of time and memory of its own, so that a training that goes wrong
takes nothing with it. The arrays go there, and the models come back, as files in a folder that is thrown away."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from hvctl.errors import DeadlineError, HvctlError
from hvctl.forecasting.series import F32

MODULE: Final = "hvctl.adapters.models.boosterchild"
MEMORY: Final = 8 << 30


@dataclass(frozen=True, slots=True)
class Lesson:
    """One model: rows of features (shared by name), what they should give, and in weight what a whole base is in units
    of the VM's size, so that an error can be priced as it will be judged. pricing: 0 prices all rows alike, 1 fully by
    what an error costs; in between trades that for fewer VMs that decide alone."""

    key: str
    features: str
    target: F32
    weight: F32
    quantile: float
    pricing: float
    parameters: Mapping[str, float | int | str | bool]


@dataclass(frozen=True, slots=True)
class Trained:
    text: str
    seconds: float


def train(
    features: Mapping[str, F32],
    lessons: list[Lesson],
    *,
    seconds: float = 3600,
    memory: int = MEMORY,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Trained]:
    """By key. DeadlineError after `seconds`; HvctlError if the child ends otherwise (memory in bytes is the most that
    it may take). Deterministic: the same arrays give the same text."""
    with tempfile.TemporaryDirectory(prefix="hvctl-train-") as name:
        folder = Path(name)
        for key, x in features.items():
            np.save(folder / f"{key}.x.npy", x, allow_pickle=False)
        for lesson in lessons:
            np.save(folder / f"{lesson.key}.y.npy", np.stack([lesson.target, lesson.weight]), allow_pickle=False)
        orders = [{k: v for k, v in asdict(x).items() if k not in ("target", "weight")} for x in lessons]
        (folder / "lessons.json").write_text(json.dumps(orders))
        took = _child(folder, seconds, memory, progress)
        return {x.key: Trained((folder / f"{x.key}.txt").read_text(), took.get(x.key, 0.0)) for x in lessons}


def _child(folder: Path, seconds: float, memory: int, progress: Callable[[str], None]) -> dict[str, float]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with (folder / "stderr").open("wb") as words:
        child = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=words,
            env=env,
            text=True,
        )
    late = threading.Event()

    def end() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(seconds, end)
    timer.start()
    took: dict[str, float] = {}
    try:
        # The limit is the child's own, set before it has loaded anything large.
        resource.prlimit(child.pid, resource.RLIMIT_AS, (memory, memory))
        assert child.stdout is not None
        for line in child.stdout:
            done: dict[str, Any] = json.loads(line)
            took[done["key"]] = done["seconds"]
            progress(f"{done['key']}: {done['trees']} trees in {done['seconds']:.1f} s")
        status = child.wait()
    except ProcessLookupError:
        status = child.wait()
    finally:
        timer.cancel()
        if child.poll() is None:
            child.kill()
            child.wait()
        if child.stdout is not None:
            child.stdout.close()
    if late.is_set():
        raise DeadlineError(
            f"the training was not done after {seconds:g} s and was ended.", "give it fewer days of data"
        )
    if status:
        last = (folder / "stderr").read_text(errors="replace").strip().splitlines()
        raise HvctlError(
            f"the training ended with status {status}: {last[-1] if last else 'it said nothing'}.",
            "give it fewer days of data, or more memory",
        )
    return took
