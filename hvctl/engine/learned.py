"""What only the steps of an operation could tell, gathered for its result."""

from __future__ import annotations

from typing import Any

from hvctl.engine.execute import Execution


def learned(run: Execution, began: float) -> dict[str, Any]:
    """What only the steps could tell, in one place. paused is seconds that the guest did not run, continued_after from
    the call until it went on, first_life from there to its answer; bytes and tracker are those of the RAM written."""
    facts = {r.name: r.facts for r in run.records if r.facts}
    found: dict[str, Any] = {}
    if run.stopped is not None and run.continued is not None:
        found |= {"paused": run.paused, "continued_after": run.continued - began}
    if "life" in facts.get("await_life", {}):
        found["first_life"] = facts["await_life"]["life"]
    passes = [r.facts for r in run.records if r.name == "restore_ram" and r.outcome == "done"]
    if passes:
        reseeded = facts.get("await_life", {}).get("reseeded") or any(
            r.name == "reseed" and r.outcome == "done" for r in run.records
        )
        found |= {
            "pages": sum(p["pages"] for p in passes),
            "bytes": sum(p["bytes"] for p in passes),
            "tracker": passes[0]["by"],
            "uniqueness": "reseeded" if reseeded else "not guaranteed",
        }
    if "audit" in facts:
        found["missed"] = facts["audit"]["missed"]
    if "write_archive" in facts:
        found |= facts["write_archive"]
    if "bind_snapshot" in facts:
        found |= facts["bind_snapshot"]
    return found
