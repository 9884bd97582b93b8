"""`convinit export`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from convinit.train.config import check_choice_or_family, near

_FORMATS = {".pt2": "torch-export", ".onnx": "onnx", "": "pretrained"}  # suffix → format


def export_command(
    model: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run of convinit train, one of its checkpoints, or what save_pretrained wrote."
        ),
    ],
    out: Annotated[Path, typer.Option(help="File to write, or folder with --format pretrained.")],
    format: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(_FORMATS.values())}: a folder for from_pretrained, for timm and for "
            "convinit predict without the run.",
            show_default="as --out ends: .onnx, .pt2, else pretrained",
        ),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the moving average of the weights.")] = False,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference from PyTorch, as a share of the largest logit.")
    ] = 1e-4,
) -> None:
    """Write a trained model for other programs: ONNX, torch.export, or a folder of safetensors and JSON.

    ONNX and torch.export take normalised images [B, C, H, W] in float32, B any number, and give logits. The
    written file is run beside the model, and kept only if both agree. Size, mean and std of the images and
    the class names are in it, as JSON under the name convinit.

    Examples:

    - `convinit export cifar10 --out model.onnx`

    - `convinit export cifar10/step-000120 --ema --out model.pt2`

    - `convinit export cifar10/best --out my-model`, later `SimpleViT.from_pretrained("my-model")`
    """
    if format is None:
        suffix = out.suffix.lower()
        if hint := near(suffix, (".onnx", ".pt2")) if suffix not in _FORMATS else "":
            raise ValueError(
                "--out must end in .onnx or .pt2, or name a folder (--format pretrained for any name), got "
                f"{out}{hint}"
            )
        format = _FORMATS.get(suffix, _FORMATS[""])
    check_choice_or_family("--format", format, tuple(_FORMATS.values()))
    kind = format
    from convinit.serve import export, load_trained, save_trained

    trained = load_trained(model, weights="ema" if ema else "model", device="cpu")
    if kind == _FORMATS[""]:
        save_trained(trained, out)
        typer.echo(f"{out}: {type(trained.network).__name__} as safetensors and JSON")
        return
    images = trained.images
    about = {**dataclasses.asdict(images), "training": trained.training}
    difference = export(
        trained.network,
        out,
        (images.channels, *images.image_size),
        format=kind,
        metadata=about,
        tolerance=tolerance,
    )
    typer.echo(
        f"{out}: {type(trained.network).__name__} as {kind}, {out.stat().st_size / 1e6:.1f} MB; "
        f"equal to PyTorch to {difference:.1g} of the largest logit"
    )
