"""Guard policies: TOML files that say what a guard may do for a VM, and when. Those that are shipped lie in
snapshots/guard."""

from __future__ import annotations

from pathlib import Path

from hvctl.decide.guardpolicy import problem
from hvctl.errors import UsageError
from hvctl.model.guard import Allowed, GuardPolicy, Watch
from hvctl.operations import policyfile
from hvctl.units import parse_duration, parse_percent, parse_size

_WORDS: policyfile.Words = {
    **dict.fromkeys(("threshold", "horizon", "window", "cool_down", "keep"), parse_duration),
    **dict.fromkeys(("release", "grow_by", "disk_full"), lambda text: parse_percent(text) / 100),
    "resident": parse_size,
}


def shipped() -> dict[str, Path]:
    return policyfile.shipped("guard")


def load(name: str) -> Watch:
    """A shipped policy by name, or one from a file; NotFoundError, UsageError."""
    path, document = policyfile.read(name, shipped(), "guard")
    policyfile.check_keys(path, document, GuardPolicy)
    allow = document.get("allow")
    for one in allow if isinstance(allow, list) else ():
        policyfile.check_keys(path, one if isinstance(one, dict) else {}, Allowed)
    policy = policyfile.parsed(GuardPolicy, path, document, _WORDS)
    if wrong := problem(policy):
        raise UsageError(f"the policy {path} does not work: {wrong}.", policyfile.README)
    return Watch(name, policy)
