"""Folders and files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """Where what takes long to make is kept: $CONVINIT_CACHE_DIR, or ~/.cache/convinit."""
    return Path(os.environ.get("CONVINIT_CACHE_DIR") or "~/.cache/convinit").expanduser()


@contextlib.contextmanager
def empty_removed(folder: Path) -> Iterator[None]:
    """Of a folder and those above it, what is made inside and is empty at the end is removed."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # one that is not empty stays, and so do those above it
            for each in new:
                each.rmdir()


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
