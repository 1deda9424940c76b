"""A disk that was unplugged and plugged again is the same one to its guest and its snapshots, but libvirt has given its
block nodes new names: here a snapshot learns them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace

from hvctl.model.snapshot import Binding, Snapshot

# Where the name of a node stands in each kind of fact of a binding (adapters/qemu/blockgraph).
_PLACE = {"node": 1, "disk": 2, "bitmap": 3}


def renamed(was: Binding, now: Binding) -> dict[str, str]:
    """New name by old one of the block nodes that are gone from `was`, where a node came that is otherwise as it was:
    its driver, its file, its backing image, and whether it is written to."""
    old, new = _nodes(was), _nodes(now)
    come = sorted(name for name in new if name not in old)
    names: dict[str, str] = {}
    for name in sorted(name for name in old if name not in new):
        match = next((c for c in come if new[c] == old[name]), None)
        if match is not None:
            come.remove(match)
            names[name] = match
    return names


def rebound(snapshot: Snapshot, names: Mapping[str, str]) -> Snapshot:
    """The snapshot with its block nodes as `names` calls them."""
    blocks = tuple(sorted(_renamed(fact, names) for fact in snapshot.binding.blocks))
    targets = {target: names.get(node, node) for target, node in snapshot.targets.items()}
    return replace(snapshot, binding=replace(snapshot.binding, blocks=blocks), targets=targets)


def _nodes(binding: Binding) -> dict[str, list[str]]:
    facts = [shlex.split(fact) for fact in binding.blocks]
    return {fact[1]: fact[2:] for fact in facts if fact[0] == "node"}


def _renamed(fact: str, names: Mapping[str, str]) -> str:
    words = shlex.split(fact)
    place = _PLACE.get(words[0])
    if place is None or words[place] not in names:
        return fact
    words[place] = names[words[place]]
    return shlex.join(words)
