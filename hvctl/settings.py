"""Where things are and what may be promised: /etc/hvctl/config.toml, then the user's, then HVCTL_*, then flags."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hvctl.errors import UsageError
from hvctl.units import parse_rate, parse_size

SYSTEM_CONFIG = Path("/etc/hvctl/config.toml")


@dataclass(frozen=True)
class Settings:
    """Every setting with its default. Sizes in bytes, rates in bits per second, times in seconds."""

    uri: str = "qemu:///system"
    state_dir: str = "/var/lib/hvctl"
    run_dir: str = "/run/hvctl"
    ram_dir: str = "/dev/shm/hvctl"  # noqa: S108 - the tmpfs of guest RAM and snapshots; its parents are checked by doctor
    database_url: str = ""
    lock_wait: float = 5.0
    libvirt_deadline: float = 5.0
    cpu_overcommit: float = 4.0
    memory_overcommit: float = 1.0
    reserve_cpus: int = 0
    reserve_memory: int = 1 << 30
    network_capacity: int | None = None
    iops_capacity: int | None = None
    memory_margin: int = 32 << 20
    snapshot_budget: int | None = None
    audit_every: int = 50
    collect_interval: float = 10.0
    roll_up_interval: float = 300.0
    recover_interval: float = 10.0
    reconcile_interval: float = 300.0
    forecast_interval: float = 300.0
    retrain_interval: float = 86400.0
    raw_hours: float = 48.0
    rolled_days: float = 90.0
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.state_dir}/hvctl.db"

    @property
    def images_dir(self) -> Path:
        return Path(self.state_dir) / "images"

    @property
    def vms_dir(self) -> Path:
        return Path(self.state_dir) / "vms"

    @property
    def locks_dir(self) -> Path:
        return Path(self.run_dir) / "locks"

    @property
    def guests_ram_dir(self) -> Path:
        """What libvirt's memory_backing_dir must be (or hold)."""
        return Path(self.ram_dir) / "guests"

    @property
    def snapshots_dir(self) -> Path:
        return Path(self.ram_dir) / "snapshots"


_PARSERS: dict[str, Callable[[str], Any]] = {
    "lock_wait": float,
    "libvirt_deadline": float,
    "cpu_overcommit": float,
    "memory_overcommit": float,
    "reserve_cpus": int,
    "reserve_memory": parse_size,
    "network_capacity": parse_rate,
    "iops_capacity": int,
    "memory_margin": parse_size,
    "snapshot_budget": parse_size,
    "audit_every": int,
    "collect_interval": float,
    "roll_up_interval": float,
    "recover_interval": float,
    "reconcile_interval": float,
    "forecast_interval": float,
    "retrain_interval": float,
    "raw_hours": float,
    "rolled_days": float,
}

# Seconds below which a job would do nothing but run, and hours and days without which nothing would be left.
_SMALLEST = {
    "collect_interval": 1.0,
    "roll_up_interval": 10.0,
    "recover_interval": 1.0,
    "reconcile_interval": 10.0,
    "forecast_interval": 10.0,
    "retrain_interval": 60.0,
    "raw_hours": 1.0,
    "rolled_days": 1.0,
}


_LARGEST = 86400.0  # no wait, deadline or ratio makes sense beyond it, and `nan` is not below it either


def _value(name: str, raw: Any, origin: str) -> Any:
    try:
        value = _PARSERS.get(name, str)(str(raw))
    except ValueError as e:
        raise UsageError(f"setting {name} = {raw!r} ({origin}) is not a number.") from e
    except UsageError as e:
        raise UsageError(f"setting {name} ({origin}): {e.message}", e.hint) from e
    smallest = _SMALLEST.get(name, 0.0)
    if isinstance(value, float) and not smallest <= value <= _LARGEST:
        raise UsageError(f"setting {name} = {raw!r} ({origin}) is not a number from {smallest:g} to {_LARGEST:g}.")
    if isinstance(value, int) and not 0 <= value < 2**62:
        raise UsageError(f"setting {name} = {raw!r} ({origin}) is not a number that can be used.")
    if name.endswith("_dir") and (not Path(value).is_absolute() or not value.isprintable()):
        raise UsageError(f"setting {name} = {raw!r} ({origin}) is not a folder's absolute path.")
    return value


def _from_file(path: Path, known: set[str]) -> dict[str, tuple[Any, str]]:
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return {}
    except (OSError, ValueError) as e:
        raise UsageError(f"{path} cannot be read: {e}.") from e
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise UsageError(f"{path} is not valid TOML: {e}.") from e
    for name in document:
        if name not in known:
            raise UsageError(f"{path} has an unknown setting {name!r}.", f"known: {', '.join(sorted(known))}")
    return {n: (_value(n, v, str(path)), str(path)) for n, v in document.items()}


def config_files(env: Mapping[str, str]) -> tuple[Path, Path]:
    """Where settings may stand, the weaker first. A file that this user may not read sets nothing for it."""
    xdg = env.get("XDG_CONFIG_HOME") or str(Path(env.get("HOME") or Path.home()) / ".config")
    return SYSTEM_CONFIG, Path(xdg) / "hvctl" / "config.toml"


def load_settings(flags: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None) -> Settings:
    """The settings in force; `origins` tells for each one that is not the default where it came from."""
    env = os.environ if env is None else env
    known = {f.name for f in fields(Settings)} - {"origins"}
    found: dict[str, tuple[Any, str]] = {}
    for path in config_files(env):
        found |= _from_file(path, known)
    if uri := env.get("LIBVIRT_DEFAULT_URI"):
        found["uri"] = (uri, "LIBVIRT_DEFAULT_URI")
    for name in known:
        variable = f"HVCTL_{name.upper()}"
        if variable in env:
            found[name] = (_value(name, env[variable], variable), variable)
    for name, value in (flags or {}).items():
        if value is not None:
            found[name] = (value, "command line")
    return Settings(**{n: v for n, (v, _) in found.items()}, origins={n: o for n, (_, o) in found.items()})
