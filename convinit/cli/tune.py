"""`convinit tune`."""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated, Any

import typer

from convinit.cli.errors import say
from convinit.cli.progress import bar


class DType(str, Enum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def tune(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape", metavar="B,HEADS,N,R", help="A shape to tune for; may be given several times."
        ),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="What the attention computes in.")] = DType.bfloat16,
    minutes: Annotated[float, typer.Option(help="For all shapes together.")] = 3.0,
    show: Annotated[bool, typer.Option("--show", help="Print what is known, and leave.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Forget all of it, and leave.")] = False,
) -> None:
    """Measure which attention is fastest on this GPU; `backend="auto"` takes it from then on.

    Our kernels are compared with float64 first, then timed next to PyTorch's for five shapes of Vision
    Transformers or those you give, for inference and training. Results are kept in `~/.cache/convinit` (or
    `$CONVINIT_CACHE_DIR`) for this GPU and these versions of torch, Triton, CUDA and convinit;
    `CONVINIT_TUNED=0` ignores them.

    Example: `convinit tune --shape 512,8,256,64 --minutes 1`
    """
    import torch

    from convinit.kernels import tuned
    from convinit.ops import tune as tuning
    from convinit.ops.verify import CASES

    if show or clear:
        paths = sorted(tuned.folder().glob("*.json"))
        problems = []
        for path in paths:
            if show:
                try:
                    _show(tuned.read(path))
                except ValueError as error:  # the others are shown all the same
                    problems.append(str(error))
            if clear:
                path.unlink()
            typer.echo(f"{'removed ' if clear else ''}{path}")
        if not paths:
            typer.echo(f"nothing measured yet in {tuned.folder()}")
        if problems:
            raise ValueError("; ".join(problems))
        return
    shapes = [_shape(text) for text in shape] if shape else list(tuning.SHAPES)
    with bar(2 * len(CASES) * len(shapes), "tuning", "rows") as progress:
        for row in tuning.tune(shapes, dtype=tuned.DTYPES[dtype.value], minutes=minutes):
            progress.write(_line(row))
            progress.update()
    path = tuned.path_of(tuned.machine(torch.cuda.current_device()))
    say(f"written to {path}", style="green")


def _shape(text: str) -> tuple[int, int, int, int]:
    try:
        batch, heads, tokens, rank = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--shape must be four integers B,heads,N,r such as 512,8,256,64, got {text!r}"
        ) from None
    return batch, heads, tokens, rank


def _show(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content["machine"]))
    for op, reason in content["disabled"].items():
        typer.echo(f"{op}: our kernels are switched off, {reason}")
    for row in content["choices"]:
        typer.echo(_line(row))
    for row in content["configs"]:
        typer.echo(f"{row['kernel']} N={row['N']} r={row['r']} {row['dtype']}: {row['config']}")


def _line(row: dict[str, Any]) -> str:
    shape = f"{row['op']} {row['shape']}"
    if "reason" in row:
        return f"{shape}: nothing chosen, {row['reason']}"
    kind = f"{'training' if row['training'] else 'inference'}{', positions' if row['positions'] else ''}"
    times = ", ".join(f"{name} {gpu:.3f} ({host:.3f})" for name, (gpu, host) in row["ms"].items())
    absent = "".join(f"; {name}: {reason}" for name, reason in row.get("absent", {}).items())
    return f"{shape} {row['dtype']} {kind}: {row['choice']}   ms (with the host): {times}{absent}"
