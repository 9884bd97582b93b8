"""Recognising a library's classes without importing the library."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_a(module: nn.Module, *paths: str) -> bool:
    """Whether the module is of a class with one of these full names, or of a subclass."""
    return any(f"{kind.__module__}.{kind.__qualname__}" in paths for kind in type(module).__mro__)


def child_name(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child


def learned_norm(module: Any) -> nn.Module | None:
    """The norm, or None where a model has none or an ``nn.Identity`` in its place."""
    return None if module is None or isinstance(module, nn.Identity) else module
