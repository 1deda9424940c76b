"""What `hvctl doctor` asks the host, each question by doing. A probe answers within its own deadline or is given up,
and one that hangs or breaks hides none of the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hvctl.adapters.node.hostpaths import HOST, HostPaths
from hvctl.adapters.probes import (
    cgroups,
    counters,
    database,
    dirtypages,
    hypervisor,
    kvm,
    monitors,
    permissions,
    pressure,
    ramdir,
    traffic,
)
from hvctl.errors import HvctlError, NotFoundError
from hvctl.model.finding import Finding, failing
from hvctl.settings import Settings


@dataclass(frozen=True, slots=True)
class Probe:
    """ask returns one finding; seconds is how long its answer is waited for."""

    ask: Callable[[Settings, HostPaths], Finding]
    seconds: float = 10.0


PROBES: dict[str, Probe] = {
    "libvirt": Probe(lambda settings, _: hypervisor.libvirt(settings), 45.0),
    "qemu": Probe(lambda _, paths: hypervisor.qemu(paths), 15.0),
    "kvm": Probe(kvm.probe, 30.0),
    "kvm-device": Probe(lambda _, paths: kvm.device(paths)),
    "ram-directory": Probe(ramdir.probe),
    "qmp-monitors": Probe(lambda settings, _: monitors.probe(settings), 20.0),
    "cgroups": Probe(lambda _, paths: cgroups.probe(paths)),
    "traffic-control": Probe(lambda _, paths: traffic.probe(paths), 15.0),
    "userfaultfd": Probe(lambda _, paths: dirtypages.userfaultfd(paths)),
    "soft-dirty": Probe(lambda _, paths: dirtypages.soft_dirty(paths)),
    "psi": Probe(lambda _, paths: pressure.probe(paths)),
    "hardware-counters": Probe(lambda *_: counters.probe()),
    "database": Probe(lambda settings, _: database.probe(settings), 15.0),
    "permissions": Probe(permissions.probe),
}


def examine(
    settings: Settings,
    names: Sequence[str] = (),
    paths: HostPaths = HOST,
    probes: Mapping[str, Probe] = PROBES,
) -> tuple[Finding, ...]:
    """One finding for each of `names` (none: of all probes), in their order. NotFoundError for a name there is not."""
    if unknown := [n for n in names if n not in probes]:
        raise NotFoundError(f"there is no probe {unknown[0]!r}.", f"there are: {', '.join(probes)}")
    asked = {name: probes[name] for name in names or probes}
    found: dict[str, Finding] = {}

    def ask(name: str) -> None:
        found[name] = _guarded(name, asked[name], settings, paths)

    # Daemon threads: a probe that hangs in the kernel must not keep hvctl from ending.
    threads = {name: threading.Thread(target=ask, args=(name,), name=f"probe-{name}", daemon=True) for name in asked}
    started = time.monotonic()
    for thread in threads.values():
        thread.start()
    for name, thread in threads.items():
        thread.join(max(0.0, started + asked[name].seconds - time.monotonic()))
    return tuple(found.get(name) or _no_answer(name, asked[name]) for name in asked)


def _guarded(name: str, probe: Probe, settings: Settings, paths: HostPaths) -> Finding:
    try:
        return probe.ask(settings, paths)
    except HvctlError as e:
        return failing(
            name, e.message.removesuffix("."), "this check", e.hint or f"hvctl --debug doctor --probe {name}"
        )
    except Exception as e:
        return failing(
            name, f"the probe broke: {type(e).__name__}: {e}", "this check", f"hvctl --debug doctor --probe {name}"
        )


def _no_answer(name: str, probe: Probe) -> Finding:
    detail = f"no answer within {probe.seconds:g} s"
    return failing(name, detail, "what depends on it", "look for what hangs: ps -eo pid,stat,wchan:32,args | grep D")
