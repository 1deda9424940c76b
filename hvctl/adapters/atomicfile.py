"""Replace a small text file so that a reader or a crash sees the old content or the new one, never a part."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


def replace_file(target: Path, text: str, *, mode: int = 0o600, like: Path | None = None) -> None:
    """Durable when it returns. `like` gives owner, mode and extended attributes instead of `mode`. OSError."""
    fd, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    new = Path(name)
    try:
        with os.fdopen(fd, "w") as stream:
            if like is None:
                os.fchmod(fd, mode)
            else:
                status = like.stat()
                os.fchown(fd, status.st_uid, status.st_gid)
                shutil.copystat(like, new)
            stream.write(text)
            stream.flush()
            os.fsync(fd)
        new.replace(target)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
