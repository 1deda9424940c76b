"""Snapshots of a running QEMU and the way back to them, in the same process or in a new one."""
