"""`make bench-rounds`: what a round of forecasts costs a daemon, for 1,000 VMs with a week of record each, with the
week that it keeps in memory and if it read all rows again. Shares are CPU time of one core at the usual interval."""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import say, write

from hvctl.adapters.fake import FakeWorld
from hvctl.adapters.store.bulk import insert_rows
from hvctl.adapters.store.database import Database
from hvctl.adapters.store.sampletables import ROLLED_SAMPLE
from hvctl.decide.rollup import SLOT
from hvctl.engine.operate import Engine
from hvctl.engine.runtime import open_engine
from hvctl.model.sample import ROLLED_COLUMNS
from hvctl.operations.recent import WHOLE, Recent
from hvctl.operations.refresh import refresh
from hvctl.operations.series import WEEK, history
from hvctl.settings import Settings

NOW = 1_800_000_000 + 60
ROUNDS = 4
MIB = 1 << 20


def record(engine: Engine, count: int) -> None:
    """A week of rows with what forecasts read of them; the VMs are numbered from 1 as they come."""
    start, end = NOW // SLOT * SLOT - round(WEEK), NOW // SLOT * SLOT
    names = {f"vm-{i}": f"vm-{i}" for i in range(count)}
    engine.store.samples.put_series(engine.facts.name, names, {"uuid": list(names), "at": [start] * count})
    chance, database = random.Random(7), Database(engine.settings.database)
    rows = [_row(chance) for _ in range(500)]
    for at in range(start + SLOT, end, SLOT):
        with database.transaction(write=True) as connection:
            batch = [(at, vm, *rows[chance.randrange(len(rows))]) for vm in range(1, count + 1)]
            insert_rows(connection, ROLLED_SAMPLE, batch)
    database.close()


def _row(chance: random.Random) -> tuple[float | None, ...]:
    known = {"vcpus": 2.0, "memory": 1024.0 * MIB, "cpu_mean": chance.random(), "memory_used_mean": 512.0 * MIB}
    known |= {f"{n}_bytes_mean": chance.random() * 1e6 for n in ("disk_read", "disk_write", "net_rx", "net_tx")}
    return tuple(known.get(name) for name in ROLLED_COLUMNS)


def cpu(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    done = work()
    return done, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vms", type=int, default=1000)
    count = parser.parse_args().vms
    with contextlib.ExitStack() as made:
        folder = Path(made.enter_context(tempfile.TemporaryDirectory(prefix="hvctl-bench-", dir="/var/tmp")))
        world = FakeWorld(folder / "world.json")
        settings = Settings(uri=world.uri, state_dir=str(folder), run_dir=str(folder / "run"))
        engine = made.enter_context(open_engine(settings))
        record(engine, count)
        recent, cases = Recent(), []
        for number in range(ROUNDS):
            engine.clock = lambda at=NOW - SLOT * (ROUNDS - 1 - number): at  # type: ignore[misc]
            _, whole = cpu(lambda: history(engine))
            week, read = cpu(lambda: recent.series(engine))
            done, made_in = cpu(lambda week=week: refresh(engine, week))  # type: ignore[misc]
            cases.append({"case": f"round {number}", "whole_s": whole, "read_s": read, "forecast_s": made_in})
            say(f"all rows {whole:.2f} s, those of the last hour {read:.2f} s, the rest {made_in:.2f} s: {done}")
    # The first round reads everything, as does one an hour.
    later = cases[1:]
    whole, read, rest = (sum(c[n] for c in later) / len(later) for n in ("whole_s", "read_s", "forecast_s"))
    every = settings.forecast_interval
    summary = {
        "core_share_all_rows": (whole + rest) / every,
        "core_share": (read + rest) / every + whole / WHOLE,
        "core_share_of_a_round": (read + rest) / every,
    }
    write("rounds", {name: round(value, 5) for name, value in summary.items()}, cases)


if __name__ == "__main__":
    main()
