"""Traffic control, by shaping a tap in both directions inside a network namespace that ends with its only process."""

from __future__ import annotations

import select
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hvctl.adapters.node.hostpaths import HOST, HostPaths
from hvctl.errors import DeadlineError, HvctlError, UnreachableError
from hvctl.model.allocation import NicLimit
from hvctl.model.finding import Finding, failing, ok
from hvctl.ports import Network

NAME = "traffic-control"
TAP = "probe0"
MAC = "52:54:00:00:00:01"
OWNER = "00000000-0000-0000-0000-000000000000"
SECONDS = 5.0
DIRECTIONS = (
    ("to the guest (tbf)", NicLimit(MAC, inbound=20_000_000)),
    ("from the guest (ingress, u32, mirred, ifb, tbf)", NicLimit(MAC, outbound=20_000_000)),
)
# The namespace is that of `cat`, which ends when hvctl does, killed or not: nothing can be left behind.
_ROOM = f"set -e; ip tuntap add dev {TAP} mode tap; ip link set {TAP} up; echo ready; exec cat"


def _kernel(namespace: str) -> Network:
    from hvctl.adapters.network.traffic import TrafficControl

    return TrafficControl(namespace)


def probe(paths: HostPaths = HOST, network: Callable[[str], Network] = _kernel) -> Finding:
    try:
        with _namespace(paths) as namespace:
            kernel = network(namespace)
            for direction, limit in DIRECTIONS:
                if fault := _unmet(kernel, limit):
                    return _without(f"{direction}: {fault}", f"limits of traffic {direction.split(' (')[0]}")
    except HvctlError as e:
        return _without(e.message.removesuffix("."), "bandwidth limits of VMs")
    return ok(NAME, "a tap was shaped in both directions, read back and cleared")


def _unmet(kernel: Network, limit: NicLimit) -> str | None:
    try:
        kernel.set_limit(TAP, limit, OWNER)
        shown = kernel.limit(TAP, MAC)
        kernel.clear(OWNER)
        left = kernel.limit(TAP, MAC)
    except HvctlError as e:
        return e.message.removesuffix(".")
    if shown != limit:
        return f"the kernel shows {shown.inbound} bit/s in and {shown.outbound} bit/s out of what was set"
    if left != NicLimit(MAC):
        return "the limit is still there after it was removed"
    return None


@contextmanager
def _namespace(paths: HostPaths) -> Iterator[str]:
    """A network namespace with one tap, as the path that names it."""
    try:
        process = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", _ROOM],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
        )  # fmt: skip
    except OSError as e:
        raise UnreachableError(f"unshare cannot be run: {e.strerror}.") from e
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        if not select.select([process.stdout], [], [], SECONDS)[0]:
            raise DeadlineError("a network namespace with a tap was not there in time.")
        if not process.stdout.readline():
            said = process.stderr.read().decode(errors="replace").strip()
            raise UnreachableError(f"a network namespace with a tap cannot be made: {said}.")
        yield str(paths.proc / str(process.pid) / "ns/net")
    finally:
        process.kill()
        process.communicate()


def _without(detail: str, lost: str) -> Finding:
    remedy = "modprobe -a tun ifb sch_tbf sch_ingress cls_u32 act_mirred"
    return failing(NAME, detail, lost, f"{remedy} (as root, with iproute2 installed)")
