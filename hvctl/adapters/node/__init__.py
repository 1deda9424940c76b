"""The host itself: what it has, what its kernel counts, and what is prepared on it."""
