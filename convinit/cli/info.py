"""`convinit info`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import convinit


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what this convinit was built with and what it runs on; paste it into bug reports."""
    build = convinit.build_info()
    if as_json:
        typer.echo(json.dumps(build, indent=2))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in build.items():
        text = (
            ("yes" if value else "no") if isinstance(value, bool) else "none" if value is None else str(value)
        )
        table.add_row(f"[bold]{key}[/bold]", text)
    Console().print(table, soft_wrap=True)
