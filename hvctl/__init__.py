"""Management plane for KVM/QEMU hosts: live allocation, warm resets, held capacity."""

__version__ = "0.1.0"
