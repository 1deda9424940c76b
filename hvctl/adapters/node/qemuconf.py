"""libvirt's qemu.conf: one setting read, and one setting changed in place while everything else stays as it is."""

from __future__ import annotations

import re
from pathlib import Path

from hvctl.adapters.atomicfile import replace_file
from hvctl.errors import RefusedError, UnreachableError

BACKUP = ".before-hvctl"


def _line(name: str, *, commented: bool) -> re.Pattern[str]:
    mark = r"[ \t]*#[ \t]*" if commented else r"[ \t]*"
    return re.compile(rf"^{mark}{re.escape(name)}[ \t]*=.*$", re.MULTILINE)


def setting(conf: Path, name: str) -> str | None:
    """The value of a text setting, None if it is not set (libvirt's default holds) or there is no file."""
    try:
        text = conf.read_text()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise UnreachableError(f"{conf} cannot be read: {e.strerror}.", "run hvctl as root") from e
    found = _line(name, commented=False).findall(text)
    if not found:
        return None
    # libvirt takes the last one where a setting stands twice.
    value = str(found[-1]).split("=", 1)[1].strip()
    quoted = re.match(r'"([^"]*)"', value) or re.match(r"'([^']*)'", value)
    return quoted[1] if quoted else value.split("#", 1)[0].strip()


def change_setting(conf: Path, name: str, value: str) -> None:
    """Set `name` to the text `value`, atomically, keeping owner, mode and every other line; the file as it was before
    the first change stays beside it."""
    if '"' in value or "\n" in value:
        raise RefusedError(f"{value!r} cannot stand in {conf}.", "choose a path without quotes or line breaks")
    try:
        _change(conf, name, f'{name} = "{value}"')
    except OSError as e:
        raise UnreachableError(f"{conf} cannot be changed: {e.strerror}.", "run hvctl as root") from e


def _change(conf: Path, name: str, wanted: str) -> None:
    text = conf.read_text()
    current = list(_line(name, commented=False).finditer(text))
    example = _line(name, commented=True).search(text)
    if current:
        text = text[: current[-1].start()] + wanted + text[current[-1].end() :]
    elif example:
        text = text[: example.end()] + "\n" + wanted + text[example.end() :]
    else:
        text = text + ("" if text.endswith("\n") or not text else "\n") + wanted + "\n"
    backup = conf.with_name(conf.name + BACKUP)
    if not backup.exists():
        replace_file(backup, conf.read_text(), like=conf)
    replace_file(conf, text, like=conf)
