"""The program /usr/libexec/hvctl-reseed of the guest images, as a 267-byte static ELF file for x86-64.

After a warm reset the guest's random generator repeats its state. Only two ioctls change that at once, busybox cannot
issue one, and no compiler may be assumed where images are built: so the machine code stands here, one instruction a
line, and tests run it. It reads at least 32 bytes (at most 512) from stdin, adds and credits them (RNDADDENTROPY), has
the generator use them now instead of within a minute (RNDRESEEDCRNG), and exits 0 only if both were accepted.
"""

from __future__ import annotations

from hvctl.adapters.images.imageelf import program

# The stack holds struct rand_pool_info: int bits, int size, then the bytes read.
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


def reseed_program() -> bytes:
    return program(_CODE, b"/dev/urandom\0")
