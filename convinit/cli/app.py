"""The application: its commands and what they have in common."""

from __future__ import annotations

from typing import Annotated

import typer

from convinit._version import __version__
from convinit.cli import errors
from convinit.cli.demo import demo
from convinit.cli.export import export_command
from convinit.cli.fit import fit
from convinit.cli.info import info
from convinit.cli.plot import plot
from convinit.cli.predict import predict_command
from convinit.cli.reproduce import reproduce
from convinit.cli.train import train
from convinit.cli.tune import tune

app = typer.Typer(
    name="convinit",
    help=(
        "Convolutional initialization for Vision Transformers: attention heads that start as random impulse "
        "convolutions (arXiv 2401.12511)."
    ),
    epilog="Start with: convinit demo --quick",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"convinit {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="On an error, show where in the code it arose.")
    ] = False,
) -> None:
    errors.show_traceback = traceback


app.command()(errors.explained(demo))
app.command()(errors.explained(fit))
app.command()(errors.explained(plot))
app.command()(errors.explained(train))
app.command()(errors.explained(reproduce))
app.command("predict")(errors.explained(predict_command))
app.command("export")(errors.explained(export_command))
app.command()(errors.explained(tune))
app.command()(errors.explained(info))
