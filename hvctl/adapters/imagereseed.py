"""The program /usr/libexec/hvctl-reseed of the guest images, as a 267-byte static ELF file for x86-64.

After a warm reset the guest's random generator repeats its state. Only two ioctls change that at once, busybox cannot
issue one, and no compiler may be assumed where images are built: so the machine code stands here, one instruction a
line, and tests run it. It reads at least 32 bytes (at most 512) from stdin, adds and credits them (RNDADDENTROPY), has
the generator use them now instead of within a minute (RNDRESEEDCRNG), and exits 0 only if both were accepted.
"""

from __future__ import annotations

import struct

_BASE = 0x400000

# Machine code, and the instruction it stands for. ">label" is the 8-bit and ">>label" the 32-bit distance to a label
# from the end of the instruction. The stack holds struct rand_pool_info: int bits, int size, then the bytes read.
_CODE = (
    ("48 81 ec 08 02 00 00", "sub rsp, 8 + 512"),
    ("31 db", "xor ebx, ebx  ; bytes read so far"),
    ("read:", ""),
    ("31 ff", "xor edi, edi  ; standard input"),
    ("48 8d 74 1c 08", "lea rsi, [rsp + rbx + 8]"),
    ("ba 00 02 00 00", "mov edx, 512"),
    ("29 da", "sub edx, ebx"),
    ("74 >filled", "jz filled"),
    ("31 c0", "xor eax, eax  ; read(2)"),
    ("0f 05", "syscall"),
    ("85 c0", "test eax, eax"),
    ("78 >fail", "js fail"),
    ("74 >filled", "jz filled  ; end of file"),
    ("01 c3", "add ebx, eax"),
    ("eb >read", "jmp read"),
    ("filled:", ""),
    ("83 fb 20", "cmp ebx, 32"),
    ("72 >fail", "jb fail"),
    ("89 5c 24 04", "mov [rsp + 4], ebx  ; size in bytes"),
    ("c1 e3 03", "shl ebx, 3"),
    ("89 1c 24", "mov [rsp], ebx  ; entropy in bits"),
    ("48 8d 3d >>path", "lea rdi, [path]"),
    ("be 01 00 00 00", "mov esi, O_WRONLY"),
    ("b8 02 00 00 00", "mov eax, 2  ; open(2)"),
    ("0f 05", "syscall"),
    ("85 c0", "test eax, eax"),
    ("78 >fail", "js fail"),
    ("89 c5", "mov ebp, eax"),
    ("89 ef", "mov edi, ebp"),
    ("be 03 52 08 40", "mov esi, RNDADDENTROPY  ; _IOW('R', 3, int[2])"),
    ("48 89 e2", "mov rdx, rsp"),
    ("b8 10 00 00 00", "mov eax, 16  ; ioctl(2)"),
    ("0f 05", "syscall"),
    ("85 c0", "test eax, eax"),
    ("75 >fail", "jnz fail"),
    ("89 ef", "mov edi, ebp"),
    ("be 07 52 00 00", "mov esi, RNDRESEEDCRNG  ; _IO('R', 7)"),
    ("b8 10 00 00 00", "mov eax, 16  ; ioctl(2)"),
    ("0f 05", "syscall"),
    ("85 c0", "test eax, eax"),
    ("75 >fail", "jnz fail"),
    ("31 ff", "xor edi, edi"),
    ("eb >exit", "jmp exit"),
    ("fail:", ""),
    ("bf 01 00 00 00", "mov edi, 1"),
    ("exit:", ""),
    ("b8 3c 00 00 00", "mov eax, 60  ; exit(2)"),
    ("0f 05", "syscall"),
    ("path:", ""),
)


def _assemble() -> bytes:
    labels: dict[str, int] = {}
    code = bytearray()
    jumps: list[tuple[int, int, str]] = []
    for text, _ in _CODE:
        if text.endswith(":"):
            labels[text[:-1]] = len(code)
            continue
        for word in text.split():
            if word.startswith(">"):
                width = 4 if word.startswith(">>") else 1
                jumps.append((len(code), width, word.lstrip(">")))
                code += bytes(width)
            else:
                code += bytes.fromhex(word)
    for at, width, label in jumps:
        code[at : at + width] = (labels[label] - at - width).to_bytes(width, "little", signed=True)
    return bytes(code) + b"/dev/urandom\0"


def reseed_program() -> bytes:
    """The ELF file: a header, one loadable segment that is the whole file, the code."""
    code = _assemble()
    headers = 64 + 56
    size = headers + len(code)
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bit, little endian, version 1
    elf = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, _BASE + headers, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)  # PT_LOAD, readable and executable
    return elf + segment + code
