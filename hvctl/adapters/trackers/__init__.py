"""Dirty trackers: which pages of a QEMU process's guest RAM were written, seen from outside."""

from hvctl.adapters.trackers.mappings import Span, spans

__all__ = ["Span", "spans"]
