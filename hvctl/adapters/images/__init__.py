"""Builds the guest images, and finds those that were built."""
