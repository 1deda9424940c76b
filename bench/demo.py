"""`make demo`: the main job on real VMs, as a user would do it, with before and after as the guest and the kernel see
them. Makes two VMs and a bridge of its own, and removes everything again, also when a step fails."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HVCTL = str(Path(sys.executable).with_name("hvctl"))
BRIDGE = f"hvdemo{os.getpid() % 100000}"
A, B = (f"demo-{os.getpid()}-{x}" for x in "ab")


def call(*argv: str, show: bool = True, check: bool = True) -> str:
    if show:
        print(f"\033[1m$ {shlex.join(Path(a).name if a == HVCTL else a for a in argv)}\033[0m", flush=True)
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if show:
        print(done.stdout + done.stderr, end="", flush=True)
    if check and done.returncode:
        raise SystemExit(f"demo: {argv[0]} ended with status {done.returncode}: {done.stderr}")
    return done.stdout


def hvctl(*argv: str, show: bool = True) -> str:
    return call(HVCTL, *argv, show=show)


def facts(vm: str) -> Any:
    return json.loads(hvctl("-f", "json", "vm", "show", vm, show=False))["vm"]


def guest(vm: str, script: str) -> str:
    return hvctl("vm", "exec", vm, "--", "sh", "-c", script, show=False).strip()


def table(heading: str) -> None:
    """What the guests and the kernel see, side by side; nothing of it is what hvctl believes."""
    rows: list[tuple[str, list[str]]] = []
    for label, script in (
        ("guest: CPUs online", "grep -c ^processor /proc/cpuinfo"),
        ("guest: MemTotal", "awk '/MemTotal/{print int($2/1024) \" MiB\"}' /proc/meminfo"),
    ):
        rows.append((label, [guest(vm, script) for vm in (A, B)]))
    taps = [facts(vm)["nics"][0]["tap"] for vm in (A, B)]
    qdiscs = [call("tc", "qdisc", "show", "dev", tap, "root", show=False).strip() for tap in taps]
    rows.append(("kernel: to the guest", [_rate(q) for q in qdiscs]))
    tune = [call("virsh", "blkdeviotune", vm, "vda", show=False) for vm in (A, B)]
    rows.append(("QEMU: disk IOPS", [_field(t, "total_iops_sec") for t in tune]))
    rows.append(("virsh: dommemstat actual", [f"{int(_stat(vm)) // 1024} MiB" for vm in (A, B)]))
    print(f"\n{heading:<28}{A:<22}{B}")
    for name, values in rows:
        print(f"  {name:<26}{values[0]:<22}{values[1]}")
    print(flush=True)


def _rate(qdisc: str) -> str:
    words = qdisc.split()
    return words[words.index("rate") + 1] if "rate" in words else "no limit"


def _field(text: str, name: str) -> str:
    value = next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith(f"{name} "))
    return "no limit" if value == "0" else value


def _stat(vm: str) -> str:
    lines = call("virsh", "dommemstat", vm, show=False).splitlines()
    return next(line.split()[1] for line in lines if line.startswith("actual"))


def wait_booted(vm: str) -> None:
    """The agent is the guest's word that it runs; nothing tells the host of it earlier."""
    deadline = time.monotonic() + 60
    while subprocess.run([HVCTL, "vm", "exec", vm, "--", "true"], capture_output=True, check=False).returncode:
        if time.monotonic() > deadline:
            raise SystemExit(f"demo: {vm} did not boot in 60 s")
        time.sleep(0.2)


def main() -> None:
    hvctl("image", "build", "micro")
    call("ip", "link", "add", BRIDGE, "type", "bridge")
    call("ip", "link", "set", BRIDGE, "up")
    try:
        allocation()
        reset()
    finally:
        print("\n--- clean up", flush=True)
        for vm in (A, B):
            call(HVCTL, "vm", "delete", vm, "--force", check=False)
        with contextlib.suppress(FileNotFoundError):
            call("ip", "link", "delete", BRIDGE, check=False)


def allocation() -> None:
    print("\n--- two VMs, and resources that move between them while they run", flush=True)
    for vm in (A, B):
        hvctl("vm", "create", vm, "--image", "micro", "--nic", BRIDGE, "--memory", "512MiB", "--start")
    for vm in (A, B):
        wait_booted(vm)
    hvctl("allocate", A, "--vcpus", "2", "--iops", "2000", "--net-in", "100Mbit", "--net-out", "100Mbit")
    hvctl("allocate", B, "--iops", "200", "--net-in", "10Mbit", "--net-out", "10Mbit")
    table("before")
    hvctl("allocate", A, "--vcpus", "1", "--memory", "256MiB", "--iops", "200", "--net-in", "10Mbit", "--diff")
    hvctl("allocate", B, "--vcpus", "2", "--memory", "768MiB", "--iops", "2000", "--net-in", "100Mbit", "--diff")
    table("after")


def reset() -> None:
    print("--- stopped and started: what was promised holds again", flush=True)
    hvctl("vm", "stop", A)
    hvctl("vm", "start", A)
    wait_booted(A)
    hvctl("vm", "show", A)
    # virsh cannot revert a VM that had a vCPU plugged since its start; now this one has not.
    print("\n--- a snapshot, a spoiled guest, and the way back without a new QEMU process", flush=True)
    guest(A, "echo precious > /data/file; sync; echo precious > /dev/shm/ram")
    before = facts(A)["process"]["pid"]
    hvctl("snapshot", "take", A, "clean")
    spoil = "echo spoiled > /data/file; dd if=/dev/urandom of=/data/junk bs=1M count=4 2>/dev/null; sync"
    guest(A, f"{spoil}; dd if=/dev/urandom of=/dev/shm/ram bs=1M count=16 2>/dev/null")
    print("spoiled:", guest(A, "cat /data/file; ls /data; ls -s /dev/shm").replace("\n", " "))
    began = time.monotonic()
    hvctl("reset", A, "--to", "clean")
    ours = time.monotonic() - began
    after = facts(A)["process"]["pid"]
    print("back:", guest(A, "cat /data/file; ls /data; cat /dev/shm/ram").replace("\n", " "))
    print(f"QEMU pid before {before}, after {after}: {'the same process' if before == after else 'ANOTHER PROCESS'}")
    hvctl("snapshot", "delete", A, "clean", show=False)
    call("virsh", "snapshot-create-as", A, "virsh")
    began = time.monotonic()
    call("virsh", "snapshot-revert", A, "virsh")
    theirs = time.monotonic() - began
    print(f"QEMU pid after virsh snapshot-revert: {facts(A)['process']['pid']}")
    pause = json.loads(hvctl("-f", "json", "operation", "list", "--vm", A, show=False))["operations"]
    number = next(o["id"] for o in pause if o["kind"] == "reset")
    steps = json.loads(hvctl("-f", "json", "operation", "show", str(number), show=False))["operation"]["steps"]
    stopped = sum(s["seconds"] for s in steps[: next(i for i, s in enumerate(steps) if s["name"] == "resume") + 1])
    print(f"\nguest stopped during hvctl reset   {stopped * 1000:8.0f} ms")
    print(f"hvctl reset, the whole command     {ours * 1000:8.0f} ms (agent, clock and reseed included)")
    print(f"virsh snapshot-revert, the command {theirs * 1000:8.0f} ms\n", flush=True)
    call("virsh", "snapshot-delete", A, "virsh", show=False)


if __name__ == "__main__":
    main()
