"""Small programs of the guest images as static ELF files for x86-64, from machine code that stands in tables.

No compiler may be assumed where images are built. A table has one instruction a line, tests run the programs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

_BASE = 0x400000


def program(code: Iterable[tuple[str, str]], data: bytes) -> bytes:
    """The ELF file: a header, one loadable segment that is the whole file, the code, and `data` behind it.

    An entry of `code` is machine code in hexadecimal and the instruction it stands for, or a name with a colon: a
    label. ">label" is the 8-bit and ">>label" the 32-bit distance to it from the end of the instruction."""
    body = _assemble(code) + data
    headers = 64 + 56
    size = headers + len(body)
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bit, little endian, version 1
    elf = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, _BASE + headers, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)  # PT_LOAD, readable and executable
    return elf + segment + body


def _assemble(code: Iterable[tuple[str, str]]) -> bytes:
    labels: dict[str, int] = {}
    out = bytearray()
    jumps: list[tuple[int, int, str]] = []
    for text, _ in code:
        if text.endswith(":"):
            labels[text[:-1]] = len(out)
            continue
        for word in text.split():
            if word.startswith(">"):
                width = 4 if word.startswith(">>") else 1
                jumps.append((len(out), width, word.lstrip(">")))
                out += bytes(width)
            else:
                out += bytes.fromhex(word)
    for at, width, label in jumps:
        out[at : at + width] = (labels[label] - at - width).to_bytes(width, "little", signed=True)
    return bytes(out)
