"""Progress bars for whatever takes more than two seconds, where tqdm is installed and somebody is looking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def progress(items: Sequence[T], description: str, *, unit: str = "it") -> Iterator[T]:
    """Iterates over `items` behind a bar on standard error that appears after two seconds.

    No bar where standard error is not a terminal, or tqdm (in the extra `train`) is not installed.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return iter(items)
    return iter(tqdm(items, desc=description, unit=unit, delay=2, disable=None, leave=False))
