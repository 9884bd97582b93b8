"""`convinit train`. Most options are fields of `convinit.train.config`, with their help."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from convinit._files import empty_removed
from convinit.cli.errors import say
from convinit.train.config import NONE, SECTIONS, Config, default_of, kind_of
from convinit.train.config_files import (
    PRESETS,
    explanation,
    parse,
    parse_settings,
    read_toml,
    resolve,
    to_toml,
)

_PANELS = {
    "model": "Model", "init": "Initial weights", "data": "Data", "recipe": "Recipe", "run": "Run",
}  # fmt: skip
# What most runs set. All else is reached by --set, so that the help can be read.
_FLAGS = {
    "model": ("name", "variant", "patch_size", "dim", "depth", "heads", "options"),
    "init": ("method", "values", "kernel_size", "peak", "fit"),
    "data": (
        "name", "root", "download", "train_count", "train_fraction", "val_fraction", "augment", "image_size",
    ),
    "recipe": ("epochs", "batch_size", "optimizer", "lr", "schedule", "weight_decay", "precision"),
    "run": ("seed", "cpu", "log_every", "tracker"),
}  # fmt: skip
_METAVARS = {int: "N", float: "X", tuple: "X,...", str: "TEXT", dict: "NAME=VALUE"}


def train(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run: checkpoints, metrics.jsonl, curves.",
            show_default="a new one: convinit-train/DATA-MODEL-INIT-TIME",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Settings to start from: " + " ".join(f"{k}: {v}" for k, v in PRESETS.items())),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help='TOML file with settings, as --save-config writes it; preset = "paper" may lead it.'
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Any other setting, such as recipe.clip=1; may be repeated. --save-config lists all.",
            show_default="none",
        ),
    ] = None,
    save_config: Annotated[
        Path | None,
        typer.Option(help="Write all settings, with a line on each, to this file, and leave."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what would be done and how long it would take; write nothing, and fetch no data.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Go on with the run in --out, if there is one; or start anew.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew and remove the run in the folder.")
    ] = False,
    **settings: Any,
) -> None:
    """Train a model from the initial weights of the papers, by their recipes or your own.

    Every setting has a name such as recipe.clip; the common ones have an option, the others go by --set. What
    the command line gives overrules the --config file, which overrules the --preset; the defaults below
    are those without either. A run that was stopped, even by kill -9, goes on where its last checkpoint is
    when the same command is given with its folder as --out, and ends with the same weights. Ctrl-C and
    SIGTERM save first. A finished run goes on with more --epochs: its learning rate is then the longer run's.

    Several GPUs: `torchrun --nproc-per-node 8 -m convinit.cli train …` or `accelerate launch`; --batch-size
    is that of all together.

    Examples:

    - `convinit train --preset quick`

    - `convinit train --preset paper --root ~/data --download --init-values mimetic --out cifar10`

    - `convinit train --preset 2404.01139 --root ~/data --train-fraction 0.1 --dry-run`

    - `convinit train --preset paper --model vit_tiny_patch16_224 --patch-size 2 --init default --root ~/data`

    - `convinit train --preset paper --save-config run.toml`, later `convinit train --config run.toml`
    """
    file = None if config is None else read_toml(config)
    given, others = _given(settings), parse_settings(setting or ())
    if twice := [path for path in others if path in given]:
        raise ValueError(f"{twice[0]} must be given once, by its option or by --set, got both")
    wanted = resolve(preset, file, {**others, **given})
    if save_config is not None:
        save_config.write_text(to_toml(wanted, explained=True), encoding="utf-8")
        Console().print(f"Written: {save_config}", highlight=False, soft_wrap=True, markup=False)
        return
    if dry_run:
        from convinit.train.run import measure

        _print_plan(wanted, *measure(wanted))
        return
    with _new_folder(wanted) if out is None else contextlib.nullcontext(out) as folder:
        _run(wanted, folder, resume=resume, overwrite=overwrite)


def _run(config: Config, out: Path, *, resume: bool, overwrite: bool) -> None:
    from convinit.cli.train_progress import watcher
    from convinit.train.run import RunInterrupted, run_training

    start = time.perf_counter()
    try:
        with watcher(config.recipe.epochs, out) as watching:
            result = run_training(config, out, resume=resume, overwrite=overwrite, watcher=watching)
    except RunInterrupted as stopped:
        if _first_process():
            name = "Ctrl-C" if stopped.signum == signal.SIGINT else signal.Signals(stopped.signum).name
            again = shlex.join(["convinit", *_again(sys.argv[1:], out)])
            say(f"stopped by {name}; {stopped.checkpoint} is saved. To go on: {again}", style="yellow")
            _write_readme(out, config)
            _draw(out)
        raise typer.Exit(128 + stopped.signum) from None
    if _first_process():
        _write_readme(out, config)
        _print_result(result.figures, result.checkpoint, result.steps, time.perf_counter() - start)
        if result.steps:
            _draw(out)


def _draw(out: Path) -> None:
    """The run's pictures; what goes wrong with them is no fault of the run's."""
    from convinit.serve import draw_run

    try:
        written = draw_run(out)
    except Exception as error:
        say(f"the weights are saved, but the run could not be drawn: {error}", style="yellow")
        return
    names = ", ".join(path.name for path in written)
    Console().print(f"Pictures and report beside them: {names}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _new_folder(config: Config) -> Iterator[Path]:
    """Makes the folder of a run that was given none; it is removed if it stays empty."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--out must be given to several processes, so that all of them write to one folder")
    model = config.model.name + (f"-{config.model.variant}" if config.model.variant else "")
    name = re.sub(r"[^\w.-]+", "_", f"{config.data.name}-{model}-{config.init.method}")
    stem = Path("convinit-train") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        folder = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
        with empty_removed(folder):
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            yield folder
            return


def _again(words: Sequence[str], out: Path) -> list[str]:
    """The command line that goes on with a run."""
    kept = [word for word in words if word not in ("--overwrite", "--no-resume")]
    named = any(word == "--out" or word.startswith("--out=") for word in kept)
    return kept if named else [*kept, "--out", str(out)]


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """ "section.key" → value, of the options that were given."""
    paths = {f"{section}_{each}": f"{section}.{each}" for section, each, _ in _fields()}
    given = {paths[name]: value for name, value in settings.items() if value not in (None, [], ())}
    return {path: value if isinstance(value, bool) else parse(path, value) for path, value in given.items()}


def _fields() -> list[tuple[str, str, dataclasses.Field]]:
    """(section, key, field) of the settings that have an option."""
    return [
        (name, each.name, each)
        for name, section in SECTIONS.items()
        for each in dataclasses.fields(section)
        if each.name in _FLAGS[name]
    ]


def _option(section: str, each: dataclasses.Field) -> inspect.Parameter:
    kind, _ = kind_of(SECTIONS[section], each.name)
    flag = "--" + (each.metadata["flag"] or each.name).replace("_", "-")
    default = default_of(SECTIONS[section], each.name)
    common: dict[str, Any] = {"help": explanation(each), "rich_help_panel": _PANELS[section]}
    hint: Any
    if kind is bool:
        hint = bool | None
        common["show_default"] = "on" if default else "off"
        declaration = f"{flag}/--no-{flag[2:]}"
    else:
        hint = list[str] | None if kind is dict else str | None
        common["show_default"] = each.metadata["unset"] if default is None else str(default or NONE)
        common["metavar"] = _METAVARS[kind]
        declaration = flag
    if isinstance(default, int | float) and kind is not bool:
        common["show_default"] = f"{default:g}"
    return inspect.Parameter(
        f"{section}_{each.name}",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[hint, typer.Option(declaration, **common)],
    )


def _with_all_options() -> None:
    """Typer reads a command's options off its signature: the fields stand there in place of **settings."""
    written = inspect.signature(train, eval_str=True)
    own = [each for each in written.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    fields = [_option(section, each) for section, _, each in _fields()]
    train.__signature__ = written.replace(parameters=[*own, *fields])  # type: ignore[attr-defined]
    train.__annotations__ = {each.name: each.annotation for each in (*own, *fields)}


_with_all_options()


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print_plan(config: Config, plan: Any, step_seconds: float) -> None:
    if not _first_process():
        return
    from convinit.train.checkpoint import megabytes

    frozen = plan.parameters - plan.trained
    channels, height, width = plan.image
    total = plan.steps * step_seconds
    rows = {
        "model": f"{plan.model}, init {config.init.method}",
        "parameters": f"{plan.parameters:,}" + (f", {frozen:,} of them frozen" if frozen else ""),
        "data": f"{config.data.name}, {plan.num_classes} classes, {plan.train_images:,} training"
        + (f", {plan.val_images:,} validation" if plan.val_images else "")
        + f" and {plan.test_images:,} test images, {channels}×{height}×{width}",
        "steps": f"{plan.steps:,}: {config.recipe.epochs} epochs of {plan.steps_per_epoch}, batch "
        f"{config.recipe.batch_size}",
        "device": f"{plan.device}, {plan.processes} process{'es' * (plan.processes > 1)}, precision "
        f"{plan.precision}",
        "time": f"{duration(total)} without tests, by {step_seconds * 1000:.1f} ms a step as measured now",
        "checkpoint": f"{megabytes(plan.checkpoint_bytes)}, {config.run.keep} kept, one being written",
    }
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in rows.items():
        table.add_row(f"[bold]{key}[/bold]", value)
    Console().print(table, soft_wrap=True, highlight=False)


def _write_readme(out: Path, config: Config) -> None:
    """How this very run is used, in its folder."""
    again = shlex.join(["convinit", *_again(sys.argv[1:], out)])
    folder = shlex.quote(str(out))
    text = f"""# {config.model.name} on {config.data.name}, init {config.init.method}

- metrics.jsonl: the records; curves.png: loss and accuracy
- config.toml in step-*: all settings
- of a Vision Transformer: init_report.txt, its heads at the start; filters.png and drift.png, then and now

    convinit predict {folder} IMAGES
    convinit export {folder} --out model.onnx
    convinit plot --run {folder}   # draws the pictures anew, also while it trains
    {again}   # with more --epochs it goes on
"""
    (out / "README.md").write_text(text, encoding="utf-8")


def _print_result(figures: Mapping[str, Any], checkpoint: Path, steps: int, seconds: float) -> None:
    from convinit.train.checkpoint import BEST

    names = {"top1": "top-1", "top5": "top-5", "ema_top1": "average's top-1", "ema_top5": "average's top-5"}
    shares = [f"{words} {figures[key]:.2%}" for key, words in names.items() if key in figures]
    if "best_val_top1" in figures:
        best = f"best validation top-1 {figures['best_val_top1']:.2%}, whose weights have top-1 "
        best += f"{figures['top1_of_best']:.2%} and are in {checkpoint.parent / BEST}"
    else:
        best = f"best top-1 {figures['best_top1']:.2%}"
    done = f"{steps} steps in {duration(seconds)}" if steps else "the run was finished already"
    Console().print(
        f"After {figures['epoch']} epochs: {', '.join(shares)}, {best}; {done}.\n"
        f"Weights: {checkpoint / 'model.safetensors'}, curves: {checkpoint.parent / 'metrics.jsonl'}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    )
