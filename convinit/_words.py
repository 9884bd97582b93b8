"""Words for messages; without PyTorch, which the command line does not load to refuse a typo."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near(word: str, words: Iterable[str], count: int = 1) -> str:
    """The end of a message that suggests the nearest of some words, `count` at most, if any is near."""
    of = {each.lower(): each for each in words}
    found = [of[each] for each in difflib.get_close_matches(word.lower(), of, count)]
    return f"; did you mean {' or '.join(found)}?" if found else ""
