"""The command `convinit`, a file for each subcommand. Its libraries come with the extra `train`."""

from __future__ import annotations

import io
import sys

_EXTRA = ("accelerate", "matplotlib", "rich", "safetensors", "sklearn", "typer")


def main() -> None:
    """Entry point of the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal lacks is no error
            stream.reconfigure(errors="backslashreplace")
    try:
        from convinit.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        sys.exit(
            f"convinit: the command line needs {error.name}, which is not installed; "
            "get all that it needs with: pip install 'convinit[train]'"
        )
    app(prog_name="convinit")
