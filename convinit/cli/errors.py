"""Errors of the library as one line each; exit codes 2 (wrong input), 1 (anything else), 130 (Ctrl-C)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

show_traceback = False  # the option --traceback


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its errors and warnings in one line each instead of pages."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            try:
                command(*args, **kwargs)
            except (ValueError, TypeError) as error:
                _fail(error, code=2)
            except (OSError, RuntimeError, ArithmeticError, ImportError) as error:
                if isinstance(error, typer.Exit | typer.Abort):  # they are RuntimeErrors
                    raise
                _fail(error, code=1)
            except KeyboardInterrupt:
                say("interrupted", style="yellow")
                raise typer.Exit(130) from None

    return wrapper


def say(message: object, *, style: str) -> None:
    """A line on standard error, unwrapped where nobody is looking and without markup in it."""
    console = Console(stderr=True)
    console.print(Text(str(message), style=style), soft_wrap=True)


def _fail(error: Exception, code: int) -> None:
    if show_traceback:
        raise error
    say(f"error: {error}", style="bold red")
    raise typer.Exit(code) from None


def _warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    say(f"warning: {message}", style="yellow")
