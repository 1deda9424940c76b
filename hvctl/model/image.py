"""A guest image: a read-only base that VMs get thin overlays of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DefaultDisk:
    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Image:
    """A built image. Paths are absolute; root is None when the guest lives in its initramfs. digest is the recipe's
    hash (inputs and package versions), so the same digest means nothing has to be built."""

    name: str
    digest: str
    kernel: str
    initrd: str
    cmdline: str
    root: str | None
    root_format: str | None
    root_size: int | None
    min_memory: int
    built_at: str
    bytes: int
    disks: tuple[DefaultDisk, ...] = ()
    packages: tuple[str, ...] = ()
