"""The libraries that the command line needs beside those of convinit itself."""

from __future__ import annotations

EXTRA = ("accelerate", "matplotlib", "rich", "safetensors", "sklearn", "typer")


def without(library: str) -> str:
    """The message where a library of the extra is missing."""
    return (
        f"the command line needs {library}, which is not installed; "
        "get all that it needs with: pip install 'convinit[train]'"
    )
