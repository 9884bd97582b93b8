"""Recognising a library's classes without importing the library."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

# The oldest releases whose models are laid out as the adapters know them; the extras ask for the same.
OLDEST = {"timm": (1, 0, 23), "transformers": (5, 9), "vit_pytorch": (1, 16, 1)}


def is_a(module: nn.Module, *paths: str) -> bool:
    """Whether the module is of a class with one of these full names, or of a subclass.

    Raises:
        ValueError: it is, in a release of its library that is too old.
    """
    for kind in type(module).__mro__:
        if f"{kind.__module__}.{kind.__qualname__}" in paths:
            _check_release(kind.__module__.partition(".")[0])
            return True
    return False


def _check_release(library: str) -> None:
    if library not in OLDEST:
        return
    try:
        found = getattr(sys.modules.get(library), "__version__", None) or version(library)
    except PackageNotFoundError:  # a source checkout, which says nothing
        return
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:3])
    if numbers < OLDEST[library]:
        oldest = ".".join(map(str, OLDEST[library]))
        raise ValueError(
            f"convinit needs {library} {oldest} or newer, found {found}; "
            f"pip install --upgrade {library.replace('_', '-')}"
        )


def child_name(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child


def learned_norm(module: Any) -> nn.Module | None:
    """The norm, or None where a model has none or an ``nn.Identity`` in its place."""
    return None if module is None or isinstance(module, nn.Identity) else module
