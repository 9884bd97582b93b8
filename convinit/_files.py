"""Atomic file writes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """Where what takes long to make is kept: $CONVINIT_CACHE_DIR, or ~/.cache/convinit."""
    return Path(os.environ.get("CONVINIT_CACHE_DIR") or "~/.cache/convinit").expanduser()


def write_whole(path: Path, text: str, *, sync: bool = False) -> None:
    """Writes a text in UTF-8. A reader or a crash meanwhile finds the old file or the new one, never a part.

    Args:
        path: of the file; its folder exists.
        text: all of it.
        sync: it must outlast a power cut, because what it replaces is removed next.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
