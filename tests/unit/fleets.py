"""Synthetic fleets for the tests of forecasts: daily waves, bursts and noise, from a fixed seed."""

from __future__ import annotations

import numpy as np

from hvctl.forecasting.series import RESOURCES, Series

SCALES = {"cpu": 2.0, "memory": 2000.0, "disk": 300.0, "network": 20.0}


def fleet(vms: int = 6, days: float = 9, seed: int = 1, resources: tuple[str, ...] = RESOURCES) -> Series:
    rng = np.random.default_rng(seed)
    slots = round(days * 288)
    time = np.arange(slots)
    values, sizes = {}, {}
    for resource in resources:
        height = SCALES[resource] * rng.uniform(0.5, 1.5, (vms, 1))
        phase = rng.uniform(0, 2 * np.pi, (vms, 1))
        wave = 1 + 0.6 * np.sin(2 * np.pi * time / 288 + phase)
        burst = 1 + 3 * (rng.random((vms, slots)) < 0.02)
        values[resource] = (height * wave * burst * rng.gamma(8, 1 / 8, (vms, slots))).astype(np.float32)
        sizes[resource] = np.full(vms, 20 * SCALES[resource], np.float32)
    return Series(tuple(f"vm-{i}" for i in range(vms)), 1_700_006_400, values, sizes)
