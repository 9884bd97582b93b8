"""`convinit plot`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import convinit
from convinit._files import empty_removed
from convinit.train.config import VIT_INITS, check_choice_or_family
from convinit.train.config_files import name_and_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

OUT = Path("convinit-plot")


def plot(
    model: Annotated[
        str | None, typer.Option(help="A model of timm by its name, such as vit_tiny_patch16_224.")
    ] = None,
    fitted: Annotated[
        Path | None, typer.Option(help="Or a folder that convinit fit --out has written.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Or a folder that convinit train has written; its pictures are drawn into it."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE for timm.create_model; may be repeated.", show_default="none"),
    ] = None,
    init: Annotated[
        str,
        typer.Option(
            help="What queries and keys start as: impulse, mimetic, random, default, scrambled, "
            "norm_matched, position_only; see init_vit_."
        ),
    ] = "impulse",
    fit: Annotated[str, typer.Option(help="Solver of the impulses: newton, adam or svd.")] = "newton",
    kernel_size: Annotated[
        int | None,
        typer.Option(
            "--kernel-size",
            "-f",
            help="Offsets are drawn from an f×f window of tokens; odd.",
            show_default="half the grid, 3 to 7",
        ),
    ] = None,
    peak: Annotated[
        float | None, typer.Option(help="Mean attention on the target, 0 to 1.", show_default="0.7")
    ] = None,
    pos_embed_gain: Annotated[
        float | None,
        typer.Option(help="Multiplies the position embedding, see init_vit_.", show_default="none"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of all draws.")] = 0,
    before: Annotated[
        Path | None,
        typer.Option(
            help="Weights at the start (.safetensors, .pt, .pth) to draw instead of those of --init."
        ),
    ] = None,
    after: Annotated[
        Path | None, typer.Option(help="Weights after training; drawn beside those at the start.")
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            help="Image files and folders; 16 of them are looked at. The pictures then show the attention "
            "that images get; may be repeated.",
            show_default="none: the positions alone",
        ),
    ] = None,
    radius: Annotated[
        int | None,
        typer.Option(
            help="The filters reach this many tokens from the query.",
            show_default="one more than the farthest offset",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for filters.png and maps.png.")] = OUT,
) -> None:
    """Draw where every attention head of a model looks, by its positions alone or on images.

    Writes filters.png, the mean attention around a query, which shows the convolution that a head is; and
    maps.png, the whole attention maps. The impulse that a head was fitted to is circled: its offset comes
    from --seed and -f, so give those that training started with, as in
    init_vit_(..., generator=torch.Generator().manual_seed(seed)).

    Examples:

    - `convinit plot --model vit_tiny_patch16_224`

    - `convinit plot --model vit_tiny_patch16_224 --option num_classes=10 --after checkpoint.safetensors`

    - `convinit plot --model vit_base_patch16_224 --init default --after pretrained.pth`

    - `convinit plot --fitted vit-tiny`

    - `convinit plot --run convinit-train/digits-simple_vit-impulse-20260131-120000`
    """
    if sum(each is not None for each in (model, fitted, run)) != 1:
        raise ValueError(
            "give --model with a name of timm, --fitted with a folder of convinit fit, or --run with one of "
            "convinit train"
        )
    check_choice_or_family("init", init, VIT_INITS)  # before PyTorch and timm are loaded
    console = Console()
    if model is None:
        others: dict[str, tuple[Any, Any]] = {  # and their defaults
            "before": (before, None), "after": (after, None), "option": (option, None),
            "kernel-size": (kernel_size, None), "peak": (peak, None),
            "pos-embed-gain": (pos_embed_gain, None), "init": (init, "impulse"), "fit": (fit, "newton"),
            "seed": (seed, 0),
        }  # fmt: skip
        if run is None:
            others["images"], why = (images, None), "--fitted, which draws weights as they are"
        else:
            others |= {"radius": (radius, None), "out": (out, OUT)}
            why = "--run, whose folder says all of that"
        given = ", ".join(f"--{name}" for name, (value, default) in others.items() if value != default)
        if given:
            raise ValueError(f"{given} must not be given with {why}")
    if run is not None:
        from convinit.serve import draw_run, load_trained, read_batch

        batch = None if images is None else read_batch(images, load_trained(run).images)
        written = ", ".join(map(str, draw_run(run, images=batch)))
        console.print(f"Written: {written}", highlight=False, soft_wrap=True, markup=False)
        return
    import torch

    from convinit import viz
    from convinit.serve.pictures import of_what

    summary = ""
    with empty_removed(out):
        out.mkdir(parents=True, exist_ok=True)
        if fitted is not None:
            figures = _of_fit(fitted, radius)
        else:
            network = _create(str(model), option or [], seed)
            weights = {path: _weights(network, path) for path in (before, after) if path is not None}
            batch = None if images is None else _batch(network, images)
            report = convinit.init_vit_(
                network, method=init, fit=fit, kernel_size=kernel_size, peak=peak, values="default",
                pos_embed_gain=pos_embed_gain, images=batch, generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip
            seen: Any = {} if batch is None else {"model": network, "images": batch}
            summary = report.summary().replace("images=batch", "--images FOLDER")
            start = None
            if before is not None:
                network.load_state_dict(weights[before])
            if after is not None:
                start = viz.head_maps(report, **seen)
                network.load_state_dict(weights[after])
            figures = {
                "filters.png": viz.model_filters(
                    report,
                    start,
                    radius=radius,
                    title=f"{model}: attention around a query, {of_what(batch)}",
                    **seen,
                ),
                "maps.png": viz.model_maps(
                    report, start, title=f"{model}: attention maps, {of_what(batch)}", **seen
                ),
            }
        for name, figure in figures.items():
            figure.savefig(out / name, dpi=150)
    if summary:
        console.print(summary, highlight=False, soft_wrap=True, markup=False)
    written = ", ".join(str(out / name) for name in figures)
    console.print(f"Written: {written}", highlight=False, soft_wrap=True, markup=False)


def _create(name: str, options: list[str], seed: int) -> nn.Module:
    from convinit.train.build import check_timm

    arguments = dict(name_and_value("option", text) for text in options)
    check_timm("model", name)
    import timm
    import torch

    torch.manual_seed(seed)
    network: nn.Module = timm.create_model(name, **arguments)
    return network


def _batch(network: nn.Module, images: list[Path]) -> Tensor:
    """Some of the images, as timm's model takes them."""
    import torch
    from timm.data import resolve_model_data_config

    from convinit.serve import ImageSpec, read_batch

    data = resolve_model_data_config(network)  # of its published weights: options may have changed the input
    patches: Any = getattr(network, "patch_embed", None)
    size = getattr(patches, "img_size", None) or data["input_size"][1:]
    first = next(layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear))
    grey = isinstance(first, torch.nn.Conv2d) and first.in_channels == 1
    mean, std = (tuple(data[key][:1] if grey else data[key]) for key in ("mean", "std"))
    return read_batch(images, ImageSpec(tuple(size), mean, std, ("any",), data["crop_pct"]))


def _weights(network: nn.Module, path: Path) -> dict[str, Tensor]:
    """Weights of this network from a file, which may be a whole checkpoint of timm's training script."""
    from timm.models import load_state_dict

    from convinit.cli.tensors import reason

    if not path.is_file():
        raise ValueError(f"weights must be in a file, got {str(path)!r}, which is none")
    try:
        weights: dict[str, Tensor] = load_state_dict(str(path), weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a broken file breaks its reader in many ways
        raise ValueError(f"{path} cannot be read as weights: {reason(error)}") from error
    own = network.state_dict()
    wrong = [
        f"{name} {list(tensor.shape)}, got {list(weights[name].shape) if name in weights else 'none'}"
        for name, tensor in own.items()
        if name not in weights or weights[name].shape != tensor.shape
    ] + [f"no {name}" for name in weights if name not in own]
    if wrong:
        raise ValueError(
            f"{path} is of another model: {'; '.join(wrong[:3])} ({len(wrong)} tensors in all). "
            "Give what it was made with, such as --option num_classes=10"
        )
    return weights


def _of_fit(folder: Path, radius: int | None) -> dict[str, Figure]:
    import torch
    from safetensors import SafetensorError, safe_open

    from convinit.fit.result import attention_maps
    from convinit.viz import attention_filter, fit_filters
    from convinit.viz.model import smaller
    from convinit.viz.squares import squares

    path = folder / "weights.safetensors"
    if not path.is_file():
        raise ValueError(
            f"fitted must be a folder of convinit fit --out, got {str(folder)!r} without {path.name}"
        )
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("wq", "wk", "pos_embed", "offsets")}
            settings: dict[str, Any] = json.loads((file.metadata() or {})["settings"])
        (height, width), scale, solver = (settings[name] for name in ("grid_size", "scale", "fit"))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} was not written by convinit fit: {error}") from error
    filters, maps = [], []
    for wq, wk in zip(tensors["wq"], tensors["wk"], strict=True):  # a layer at a time: the maps can be large
        own = attention_maps(wq, wk, tensors["pos_embed"], scale)
        filters.append(attention_filter(own, (height, width), radius=radius))
        maps += smaller([own])
    what = f"{height}×{width} tokens, {solver}"
    return {
        "filters.png": fit_filters(
            tensors["offsets"],
            torch.stack(filters),
            (height, width),
            title=f"Attention around a query, {what}",
        ),
        "maps.png": squares({"fitted": maps}, range(len(maps)), title=f"Attention maps, {what}"),
    }
