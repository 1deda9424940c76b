"""`make picture`: runs the tour on a real VM and draws what the terminal showed as docs/terminal.svg."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

HVCTL = str(Path(sys.executable).with_name("hvctl"))
VM = "ci-1"
TOUR = (
    ("vm", "create", VM, "--image", "micro", "--start"),
    ("allocate", VM, "--vcpus", "2", "--memory", "512MiB", "--iops", "500", "--diff"),
    ("vm", "exec", VM, "--", "sh", "-c", "nproc; free -m | grep Mem; echo precious > /data/file; sync"),
    ("snapshot", "take", VM, "clean"),
    ("vm", "exec", VM, "--", "sh", "-c", "rm /data/file; head -c 8000000 /dev/urandom > /dev/shm/junk; ls /data"),
    ("reset", VM, "--to", "clean"),
    ("vm", "exec", VM, "--", "sh", "-c", "cat /data/file; ls /dev/shm"),
    ("allocate", VM, "--memory", "64MiB"),
    ("vm", "delete", VM, "--force"),
)


def settled() -> bool:
    """Booted, and the balloon at what was promised."""
    shown = subprocess.run([HVCTL, "-f", "json", "vm", "show", VM], capture_output=True, check=True).stdout
    vm = json.loads(shown)["vm"]
    agent = subprocess.run([HVCTL, "vm", "exec", VM, "--", "true"], capture_output=True, check=False)
    return agent.returncode == 0 and vm["allocation"]["memory"] == vm["promised"]["memory"]


def main() -> None:
    console = Console(record=True, width=100, file=sys.stderr)
    try:
        for argv in TOUR:
            while argv[0] == "allocate" and not settled():
                time.sleep(0.3)
            console.print(Text(f"# hvctl {shlex.join(argv)}", style="bold"))
            done = subprocess.run([HVCTL, *argv], capture_output=True, text=True, check=False)
            console.print(Text((done.stdout + done.stderr).rstrip()))
    finally:
        subprocess.run([HVCTL, "vm", "delete", VM, "--force"], capture_output=True, check=False)
    path = Path(__file__).parent.parent / "docs" / "terminal.svg"
    path.parent.mkdir(exist_ok=True)
    # Without the fonts that rich would have the reader's browser fetch: a terminal's own does.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="hvctl"), flags=re.DOTALL)
    path.write_text(re.sub(r"<!--.*?-->\s*", "", picture, flags=re.DOTALL))


if __name__ == "__main__":
    main()
