"""hvctl as a child process on a fake host, armed with a fault."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from host.loaded import Loaded

from hvctl.adapters.fake import FakeWorld
from hvctl.settings import Settings


@dataclass(frozen=True)
class FakeSite:
    """A folder with a fake host, its journal and its locks, and hvctl commands on them."""

    folder: Path
    database: str = ""

    @property
    def world(self) -> FakeWorld:
        return FakeWorld(self.folder / "world.json")

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HVCTL_URI": self.world.uri,
            "HVCTL_STATE_DIR": str(self.folder),
            "HVCTL_RUN_DIR": str(self.folder / "run"),
            "HVCTL_RAM_DIR": str(self.folder / "ram"),
            "HVCTL_DATABASE_URL": self.database,
        }

    @property
    def settings(self) -> Settings:
        return Settings(
            uri=self.world.uri,
            state_dir=str(self.folder),
            run_dir=str(self.folder / "run"),
            ram_dir=str(self.folder / "ram"),
        )

    def run(self, *argv: str, fault: str = "") -> subprocess.CompletedProcess[str]:
        return Loaded(self.environment).run(*argv, fault=fault)

    def json(self, *argv: str) -> Any:
        done = self.run("-f", "json", *argv)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
