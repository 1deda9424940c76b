"""What became of a guest's connections in the host's connection tracking."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Forgotten:
    """deleted counts entries, each of which holds both directions; None: this kernel tracks no connections.

    addresses are those that were taken for the guest's. disputed are those that it claims and that are the host's, are
    routed elsewhere, or that somebody else answers for too: what the kernel holds of them was left alone.
    """

    deleted: int | None
    addresses: tuple[str, ...] = ()
    disputed: tuple[str, ...] = ()
