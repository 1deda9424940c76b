"""What hvctl writes into the kernel's traffic control: its numbers, its names, and the size of a token bucket.
Pure, so that the marks by which hvctl knows its own parts again are in one place."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2s

from hvctl.errors import RefusedError
from hvctl.units import format_rate

# "hv" in ASCII. As a qdisc's major number it is below 0x8000, where the kernel starts to number qdiscs that nobody
# numbered, and as a filter's preference below 0xc000, from where it counts down; people and libvirt use small numbers.
MARK = 0x6876
PREFERENCE = MARK
# Two, so that a bucket which cannot be changed in place is replaced by one of the other number in a single request.
HANDLES = (MARK << 16, (MARK + 1) << 16)

IFB_PREFIX = "hvi"
_ALIAS = "hvctl"

MIN_RATE = 8_000
MAX_RATE = (2**32 - 1) * 8

_BURST_SECONDS = 0.010
_MIN_BURST = 16 << 10
_QUEUE_SECONDS = 0.050
_FRAME_HEADER = 22


@dataclass(frozen=True, slots=True)
class Bucket:
    """A token bucket: rate in bytes per second, burst (the bucket's depth) and queue (the longest backlog) in bytes."""

    rate: int
    burst: int
    queue: int

    def fits_over(self, other: Bucket) -> bool:
        """Whether a tbf of `other` may be changed into this one in place.

        Only to a deeper bucket: tbf checks the size of a packet when it takes it in, so one that waits and is larger
        than the new bucket never gets its tokens, and everything behind it waits for ever (seen on Linux 6.18, where
        64 KiB of GSO waited as the rate fell). Deeper by more than the microsecond that depths are rounded to.
        """
        return self.burst - other.burst > self.rate // 1_000_000 + 1


def bucket(rate: int, mtu: int) -> Bucket:
    """The token bucket that lets TCP reach `rate` bits per second; RefusedError for a rate the kernel cannot keep.

    burst: tc-tbf(8) asks for at least rate/HZ, since tokens that arrive while the bucket is full are lost; 10 ms is the
    longest tick in use (HZ=100) and covers a host that serves the timer late. To it come two frames or 16 KiB, because
    a single frame larger than the bucket would be dropped. A GSO packet (64 KiB) larger than the bucket is not: tbf
    cuts it into frames, which happens only below 40 Mbit/s, where it costs little and keeps slow links smooth.

    queue: tc-tbf(8)'s limit = rate * latency + burst, with 50 ms: one queue of the longest round trip inside a
    continent, so that a single TCP stream, which halves its window at a loss, still keeps the link busy.
    """
    if rate < MIN_RATE or rate > MAX_RATE:
        raise RefusedError(
            f"a bandwidth of {format_rate(rate)} is outside of what the kernel's token bucket can keep.",
            f"use {format_rate(MIN_RATE)} to {format_rate(MAX_RATE)}, or none for unlimited",
        )
    if rate % 8:
        raise RefusedError(
            f"a bandwidth of {rate} bit/s is not a whole number of bytes per second, which the kernel counts in.",
            f"use {rate // 8 * 8}bit",
        )
    per_second = rate // 8
    burst = max(_MIN_BURST, 2 * (mtu + _FRAME_HEADER)) + int(per_second * _BURST_SECONDS)
    return Bucket(per_second, burst, int(per_second * _QUEUE_SECONDS) + burst)


def ifb_name(tap: str) -> str:
    """The ifb device of a tap: 15 characters, the longest name the kernel takes, whatever the tap is called."""
    return IFB_PREFIX + blake2s(tap.encode(), digest_size=6).hexdigest()


@dataclass(frozen=True, slots=True)
class Mark:
    """What an ifb's alias says: the VM and the tap it serves, and the root qdisc the tap had (empty: the kernel's own).

    An alias that is not there at all reads as a mark without owner: hvctl was killed between making and marking it.
    """

    owner: str
    tap: str
    default: str = ""

    @property
    def alias(self) -> str:
        # A colon separates safely: the kernel refuses it in device names.
        return ":".join((_ALIAS, self.owner, self.tap, self.default)).removesuffix(":")

    @classmethod
    def parse(cls, alias: str | None) -> Mark | None:
        """None for an alias that somebody else wrote."""
        if not alias:
            return cls("", "")
        parts = alias.split(":")
        return cls(*parts[1:]) if parts[0] == _ALIAS and len(parts) in (3, 4) else None
