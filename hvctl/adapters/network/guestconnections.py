"""How many connections the host tracks of each guest: one dump of the kernel's table for all of them.

An address is a guest's if the host's ARP cache has it for the guest's MAC on the guest's bridge. The guest says so
itself, which is enough to count by and not to act on (guestflows asks more). IPv6 has no such cheap table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from hvctl.adapters.network.conntrack import AbsentError, conntrack
from hvctl.errors import HvctlError

MOST = 20_000
"""Entries beyond which the table is not read: each costs about 10 us."""

_COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")
_ARP = Path("/proc/net/arp")
_NET = Path("/sys/class/net")

Port = tuple[str, str]
"""A bridge, and the last five bytes of a MAC: libvirt gives a tap its guest's, with fe as the first byte."""


class Connections:
    """Keeps which bridge each tap is on, since that takes two files a tap to find out."""

    def __init__(self) -> None:
        self._ports: dict[str, Port | None] = {}

    def count(self, taps: Mapping[str, Iterable[str]]) -> dict[str, int]:
        """By VM, of the taps of each; VMs of which no address is known are left out, and all of them where the table
        is too large or there is none."""
        try:
            tracked = int(_COUNT.read_text())
            addresses = _neighbours(_ARP.read_text())
        except (OSError, ValueError):
            return {}
        of_vm = {vm: self._addresses(mine, addresses) for vm, mine in taps.items()}
        of_vm = {vm: mine for vm, mine in of_vm.items() if mine}
        if not of_vm or tracked > MOST:
            return {}
        if tracked == 0:
            return dict.fromkeys(of_vm, 0)
        try:
            with conntrack() as table:
                counts = table.count({a for mine in of_vm.values() for a in mine})
        except (AbsentError, HvctlError):
            return {}
        return {vm: sum(counts.get(a, 0) for a in mine) for vm, mine in of_vm.items()}

    def _addresses(self, taps: Iterable[str], known: Mapping[Port, list[str]]) -> list[str]:
        found: list[str] = []
        for tap in taps:
            if tap not in self._ports:
                self._ports[tap] = _port(tap)
            port = self._ports[tap]
            found += known.get(port, []) if port else []
        return found

    def forget(self) -> None:
        """Taps are named anew when VMs start."""
        self._ports.clear()


def tracked() -> bool:
    """Whether this kernel tracks connections."""
    return _COUNT.exists()


def _port(tap: str) -> Port | None:
    try:
        mac = (_NET / tap / "address").read_text().strip()
        return (_NET / tap / "master").readlink().name, mac.lower()[3:]
    except OSError:
        return None


def _neighbours(text: str) -> dict[Port, list[str]]:
    """Complete entries of /proc/net/arp."""
    found: dict[Port, list[str]] = {}
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) == 6 and int(fields[2], 16) & 0x2:
            found.setdefault((fields[5], fields[3].lower()[3:]), []).append(fields[0])
    return found
