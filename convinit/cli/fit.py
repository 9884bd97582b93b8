"""`convinit fit`."""

from __future__ import annotations

import json
import re
import tempfile
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import convinit
from convinit._files import empty_removed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from convinit.fit import QKFit
    from convinit.fit.api import Solver as FitOptions


class Solver(str, Enum):
    newton = "newton"
    adam = "adam"
    svd = "svd"


class Offsets(str, Enum):
    random = "random"
    fixed = "fixed"


class PaddingMode(str, Enum):
    zeros = "zeros"
    replicate = "replicate"
    circular = "circular"
    reflect = "reflect"


def fit(
    grid: Annotated[str, typer.Option(help="Token grid HxW, or one number for a square.")] = "16x16",
    dim: Annotated[
        int | None,
        typer.Option(help="Width D of the tokens; a file's own if --pos-embed is one.", show_default="512"),
    ] = None,
    heads: Annotated[int, typer.Option(help="Heads of a layer.")] = 8,
    layers: Annotated[int, typer.Option(help="Layers.")] = 6,
    rank: Annotated[int | None, typer.Option(help="Head dimension r.", show_default="dim / heads")] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            help="Softmax temperature: attention = softmax(scale · q kᵀ).", show_default="rank^-0.5"
        ),
    ] = None,
    kernel_size: Annotated[
        int | None,
        typer.Option(
            "--kernel-size",
            "-f",
            help="Offsets are drawn from an f×f window of tokens; odd.",
            show_default="half the grid, 3 to 7",
        ),
    ] = None,
    offsets: Annotated[
        Offsets | None,
        typer.Option(
            help="How heads are dealt their offsets.", show_default="each window cell equally often"
        ),
    ] = None,
    solver: Annotated[
        Solver,
        typer.Option(
            "--fit",
            help="Solver: newton is ours; adam (arXiv 2401.12511) and svd (arXiv 2505.19985) are the "
            "papers'.",
        ),
    ] = Solver.newton,
    weight_norm: Annotated[
        float | None,
        typer.Option(
            help="Frobenius norm of each head's W_q and W_k (newton, svd); more is sharper.",
            show_default="as --peak needs; svd: 7",
        ),
    ] = None,
    peak: Annotated[
        float | None,
        typer.Option(
            help="Mean attention on the target, 0 to 1, instead of --weight-norm (newton).",
            show_default="0.7",
        ),
    ] = None,
    padding_mode: Annotated[
        PaddingMode, typer.Option(help="Where tokens look whose target is off the grid; zeros: nowhere.")
    ] = PaddingMode.zeros,
    pos_embed: Annotated[
        str,
        typer.Option(
            help="Position embedding: sincos; learned (truncated normal of std 0.02, then LayerNorm); "
            "or a .pt, .safetensors or .npy file with [N, D] or [1, N, D]."
        ),
    ] = "sincos",
    pos_embed_key: Annotated[
        str | None, typer.Option(help="Name of the tensor, in a file that holds several.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of all draws.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Steps of --fit adam.", show_default="10000")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for weights.safetensors, fit.json and filters.png; without it nothing is written."
        ),
    ] = None,
) -> None:
    """Fit query and key weights whose attention maps are random impulse convolutions.

    Prints what every head reached: its offset (dy, dx) in tokens; mse, the mean squared error of the map;
    peak, the mean attention on the target; hit rate, the share of tokens whose largest attention is the
    target; and the Frobenius norm of its weights.

    Examples:

    - `convinit fit`

    - `convinit fit --grid 14x14 --dim 192 --heads 3 --layers 12 -f 3 --pos-embed learned --out vit-tiny`

    - `convinit fit --grid 8 --dim 128 --heads 4 --layers 1 --fit adam --steps 2000`
    """
    grid_size = _grid_size(grid)
    import torch

    from convinit._checks import check_int
    from convinit.fit import SVD, Adam, Newton
    from convinit.init.options import InitOptions

    draws = InitOptions(kernel_size=kernel_size, offsets=None if offsets is None else offsets.value)
    kernel_size = draws.window([grid_size])
    generator = torch.Generator().manual_seed(check_int("seed", seed, minimum=-(2**63)))
    P = _pos_embed(pos_embed, pos_embed_key, grid_size, dim, generator)
    dim = P.shape[1]
    check_int("heads", heads)
    check_int("layers", layers)
    if rank is None and dim % heads:
        raise ValueError(f"dim must be divisible by heads, got {dim} and {heads}; or give --rank")
    rank = dim // heads if rank is None else check_int("rank", rank)
    scale = rank**-0.5 if scale is None else scale
    if steps is not None and solver is not Solver.adam:
        raise ValueError(f"steps belongs to fit adam, got fit {solver.value}")
    if weight_norm is not None and solver is Solver.adam:
        raise ValueError("weight_norm belongs to the fits newton and svd, got fit adam")

    options: FitOptions
    if solver is Solver.adam:
        options = Adam(heads=heads) if steps is None else Adam(heads=heads, steps=check_int("steps", steps))
    elif solver is Solver.svd:
        options = SVD() if weight_norm is None else SVD(weight_norm=weight_norm)
    else:
        options = Newton()
    with empty_removed(out or Path()):
        if out is not None:  # what would stop the writing shows before the work, not after it
            import safetensors.torch  # noqa: F401

            from convinit import viz  # noqa: F401

            out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()
        dealt = draws.deal([heads] * layers, kernel_size, generator)
        result = convinit.fit_qk(
            P,
            torch.cat(dealt),
            grid_size,
            rank,
            scale=scale,
            fit=options,
            weight_norm=weight_norm if solver is Solver.newton else None,
            peak=peak,
            padding_mode=padding_mode.value,
            generator=generator,
        )
        written: list[tuple[Path, str]] = []
        if out is not None:  # before anything is printed, which may fail where nobody reads on
            settings = {
                "grid_size": list(grid_size), "dim": dim, "heads": heads, "layers": layers, "rank": rank,
                "scale": scale, "kernel_size": kernel_size, "offsets": draws.offsets, "fit": solver.value,
                "weight_norm": weight_norm, "peak": peak, "padding_mode": padding_mode.value,
                "pos_embed": pos_embed, "seed": seed,
                "steps": options.steps if isinstance(options, Adam) else None,
            }  # fmt: skip
            written = _write(out, result, layers, grid_size, settings)
    console = Console()
    console.print(_table(result, layers))
    console.print(_summary(result, layers), highlight=False, soft_wrap=True)
    for path, what in written:
        console.print(f"{path}: {what}", highlight=False, soft_wrap=True, markup=False)


def _grid_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:[x×](\d+))?", text.strip())
    if match is None:
        raise ValueError(f"grid must be HxW or one number, such as 16x16 or 16, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _pos_embed(
    source: str, key: str | None, grid_size: tuple[int, int], dim: int | None, generator: torch.Generator
) -> Tensor:
    """P [N, D] from its name or file."""
    import torch
    import torch.nn.functional as F

    from convinit._checks import check_int
    from convinit.cli.tensors import load_tensor
    from convinit.nn import sincos_2d

    if source == "sincos":
        return sincos_2d(grid_size, 512 if dim is None else dim)
    if source == "learned":
        P = torch.empty(grid_size[0] * grid_size[1], check_int("dim", 512 if dim is None else dim))
        return F.layer_norm(torch.nn.init.trunc_normal_(P, std=0.02, generator=generator), P.shape[1:])
    P = load_tensor(Path(source), key)
    if P.dim() == 3 and P.shape[0] == 1:
        P = P[0]
    if P.dim() != 2:
        raise ValueError(f"pos_embed must be [N, D] or [1, N, D], got {list(P.shape)} in {source}")
    if dim is not None and P.shape[1] != dim:
        raise ValueError(f"dim is {dim}, but pos_embed in {source} has D = {P.shape[1]}; leave --dim out")
    return P


def _table(result: QKFit, layers: int) -> Table:
    heads = len(result.mse) // layers
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("layer", "head", "offset", "mse", "peak", "hit rate", "weight norm"):
        table.add_column(name, justify="right")
    assert result.offsets is not None
    for b in range(len(result.mse)):
        dy, dx = result.offsets[b].tolist()
        table.add_row(
            str(b // heads) if b % heads == 0 else "",
            str(b % heads),
            f"{dy:+d}, {dx:+d}",
            f"{result.mse[b]:.2e}",
            f"{result.peak[b]:.3f}",
            f"{result.hit_rate[b]:.3f}",
            f"{result.weight_norm[b]:.2f}",
            end_section=b % heads == heads - 1,
        )
    return table


def _summary(result: QKFit, layers: int) -> str:
    return (
        f"{layers} × {len(result.mse) // layers} heads in {result.seconds:.2f} s: "
        f"mean mse {result.mse.mean():.2e}, "
        f"peak {result.peak.mean():.3f} (lowest {result.peak.min():.3f}), "
        f"hit rate {result.hit_rate.mean():.3f}, weight norm {result.weight_norm.mean():.2f}"
    )


def _write(
    out: Path, result: QKFit, layers: int, grid_size: tuple[int, int], settings: dict[str, Any]
) -> list[tuple[Path, str]]:
    """Writes the folder; returns what is in which file."""
    import torch
    from safetensors.torch import save_file

    from convinit.viz import attention_filter, fit_filters

    assert result.offsets is not None
    metrics = {name: getattr(result, name) for name in ("mse", "peak", "hit_rate", "weight_norm")}
    tensors = {"wq": result.wq, "wk": result.wk, "offsets": result.offsets, **metrics}
    by_layer = {name: t.unflatten(0, (layers, -1)).contiguous() for name, t in tensors.items()}
    weights = out / "weights.safetensors"
    versions = {name: convinit.build_info()[name] for name in ("convinit", "torch", "platform")}
    save_file(
        {**by_layer, "pos_embed": result.pos_embed.contiguous()},
        weights,
        metadata={"format": "pt", "settings": json.dumps(settings), "versions": json.dumps(versions)},
    )
    record = out / "fit.json"
    rows = {name: tensor.tolist() for name, tensor in by_layer.items() if name in ("offsets", *metrics)}
    content = {"settings": settings, "versions": versions, "seconds": result.seconds, **rows}
    record.write_text(json.dumps(content, indent=1), encoding="utf-8")

    # A head at a time: N×N maps of all heads together can be gigabytes.
    filters = torch.cat(
        [attention_filter(result.attention_map([b]), grid_size) for b in range(len(result.mse))]
    )
    figure = fit_filters(
        by_layer["offsets"],
        filters.unflatten(0, (layers, -1)),
        grid_size,
        title="Attention around a query (centre), {}×{} tokens, {fit}".format(*grid_size, **settings),
    )
    picture = out / "filters.png"
    figure.savefig(picture, dpi=120)
    return [
        (weights, "wq, wk [layers, heads, D, r], offsets, metrics, pos_embed"),
        (record, "settings and metrics of every head"),
        (picture, "the filter of every head"),
    ]
