"""The records of a run: metrics.jsonl, one JSON object a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Records:
    """Appends to a file of JSON lines.

    Args:
        path: of the file.
        length: its length in bytes at the checkpoint from which the run goes on; what was written after it is
            dropped, since it will be written again. 0 starts a new file.
    """

    def __init__(self, path: Path, length: int = 0) -> None:
        self.path = path
        self._file = open(path, "ab")
        if self._file.tell() > length:
            self._file.truncate(length)

    def append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Puts the file onto the disk; returns its length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file, oldest first; a line that a killed process left unfinished is dropped.

    Raises:
        ValueError: a line is no record.
    """
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("it is no record")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is damaged ({error}); remove that line") from error
        records.append(record)
    return records
