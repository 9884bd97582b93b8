"""The command `convinit`, a file for each subcommand. Its libraries come with the extra `train`.

A subcommand imports torch, and what stands on torch, in its function: help and typos are answered without.
"""

from __future__ import annotations

import io
import sys

from convinit.cli.extra import EXTRA, without


def main() -> None:
    """Entry point of the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal lacks is no error
            stream.reconfigure(errors="backslashreplace")
    try:
        from convinit.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        sys.exit(f"convinit: {without(error.name)}")
    app(prog_name="convinit")
