"""Packages of the extras, imported where they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, what_for: str, install: str = "'convinit[train]'") -> ModuleType:
    """The module; ImportError with what to `install` where it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what_for} needs {module.partition('.')[0]}, which is not installed; get it with: "
            f"pip install {install}"
        ) from error
