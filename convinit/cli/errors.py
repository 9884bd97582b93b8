"""Errors of the library as one line each; exit codes 2 (wrong input), 1 (anything else), 130 (Ctrl-C)."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, get_args

import typer
from rich.console import Console
from rich.text import Text
from typer.models import OptionInfo

from convinit.cli.extra import EXTRA, without
from convinit.train.config import SECTIONS

show_traceback = False  # the option --traceback


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its errors and warnings in one line each instead of pages."""

    flags = _flags(command)

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            try:
                command(*args, **kwargs)
            except (ValueError, TypeError) as error:
                _fail(error, code=2, message=_as_typed(str(error), flags, kwargs))
            except ModuleNotFoundError as error:
                library = (error.name or "").partition(".")[0]
                _fail(error, code=1, message=without(library) if library in EXTRA else str(error))
            except (OSError, RuntimeError, ArithmeticError, ImportError) as error:
                if isinstance(error, typer.Exit | typer.Abort):  # they are RuntimeErrors
                    raise
                _fail(error, code=1, message=_as_typed(str(error), flags, kwargs))
            except KeyboardInterrupt:
                say("interrupted", style="yellow")
                raise typer.Exit(130) from None

    return wrapper


def say(message: object, *, style: str) -> None:
    """A line on standard error, unwrapped where nobody is looking and without markup in it."""
    console = Console(stderr=True)
    console.print(Text(str(message), style=style), soft_wrap=True)


# What functions of the library call the value of an option that has another name.
_LIBRARY_NAMES = {
    "plot": {"method": "--init"},
    "train": {"num_heads": "--heads"},
}


def _flags(command: Callable[..., None]) -> dict[str, str]:
    """Argument of the command, setting of a run ("section.key") or its key alone → option, as it is typed."""
    flags: dict[str, str] = {}
    for name, each in inspect.signature(command, eval_str=True).parameters.items():
        option = next((note for note in get_args(each.annotation)[1:] if isinstance(note, OptionInfo)), None)
        if option is not None:
            words = [word for word in (option.default, *(option.param_decls or ())) if isinstance(word, str)]
            declared = next((word for word in words if word.startswith("--")), "--" + name.replace("_", "-"))
            flags[name] = declared.partition("/")[0]
    if command.__name__ == "train":
        for name, flag in list(flags.items()):
            section, _, key = name.partition("_")
            if section in SECTIONS:
                flags |= {f"{section}.{key}": flag, key: flags.get(key, flag)}
    return flags | _LIBRARY_NAMES.get(command.__name__, {})


def _as_typed(message: str, flags: Mapping[str, str], given: Mapping[str, Any]) -> str:
    """A message of the library with options in place of arguments, where it can only mean them.

    A setting "section.key" is an option only where it was typed: it may be from a file. A plain word is one
    only at the start, where the library names what is wrong: "peak must be …", "give weight_norm or peak, …".
    A switch is one everywhere: "download=True fetches it".
    """

    def typed(found: re.Match) -> str:
        word = found[0]
        if "." in word:
            return flags[word] if given.get(word.replace(".", "_")) not in (None, [], ()) else word
        begins = re.fullmatch(r"(give )?(\w+ or )?", message[: found.start()])
        return flags[word] if "_" in word or begins else word

    dry = " without --dry-run" if given.get("dry_run") else ""
    message = re.sub(
        r"\b(\w+)=True\b", lambda found: flags[found[1]] + dry if found[1] in flags else found[0], message
    )
    if message.startswith("["):  # of the keys of a section
        return message
    names = "|".join(map(re.escape, sorted(flags, key=len, reverse=True)))
    return re.sub(rf"(?<![\w./-])({names})(?![\w/]|\.\w)", typed, message) if names else message


def _fail(error: Exception, code: int, message: str) -> None:
    if show_traceback:
        raise error
    say(f"error: {message}", style="bold red")
    raise typer.Exit(code) from None


def _warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    say(f"warning: {message}", style="yellow")
