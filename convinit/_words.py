"""Words for messages; without PyTorch, which the command line does not load to refuse a typo."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near(word: str, words: Iterable[str]) -> str:
    """The end of a message that suggests the nearest of some words, if one is near."""
    of = {each.lower(): each for each in words}
    found = difflib.get_close_matches(word.lower(), of, 1)
    return f"; did you mean {of[found[0]]}?" if found else ""
