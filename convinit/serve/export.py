"""A model as one file for programs without convinit: torch.export or ONNX, checked against PyTorch."""

from __future__ import annotations

import copy
import importlib
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convinit.nn import ConvInitAttention

__all__ = ["FORMATS", "export"]

FORMATS = ("torch-export", "onnx")
_CHECKED = (1, 2, 5)  # batch sizes


def export(
    model: nn.Module,
    path: str | Path,
    image_shape: Sequence[int],
    *,
    format: str = "onnx",
    metadata: Mapping[str, Any] | None = None,
    tolerance: float = 1e-4,
) -> float:
    """Writes a classifier as a graph of plain PyTorch or ONNX operators, in float32, for any batch size.

    The written file is loaded again and run on random images, in batches of 1, 2 and 5, beside the model; it
    takes its place under `path` only if they agree.

    Args:
        model: images [B, C, H, W] → logits [B, classes]; taken in evaluation mode, left as it is.
        path: of the file, such as model.onnx, or model.pt2, which ``torch.export.load`` reads; replaced if
            it is there.
        image_shape: (C, H, W).
        format: "torch-export", or "onnx", whose input is "images" and whose output is "logits".
        metadata: JSON-able; kept in the file, as the extra file or metadata property "convinit".
        tolerance: of the largest difference, as a share of the largest logit.

    Returns:
        That difference.

    Raises:
        ImportError: packages of the extra `export` are not installed (format "onnx").
        ValueError: no such format, the model does not take such images, or metadata is not JSON-able.
        RuntimeError: the model cannot be exported, or what was written computes something else. No file is
            left, and one that was there before is as it was.
        OSError: the file cannot be written.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    write, reader = _WRITERS[format]
    if format == "onnx":
        _require_onnx()
    try:
        text = json.dumps(dict(metadata or {}), allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"metadata must hold what JSON can: {error}") from error
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(batch, *image_shape, generator=generator) for batch in _CHECKED]
    reference = copy.deepcopy(model).to("cpu", torch.float32).eval()
    try:
        with torch.inference_mode():
            expected = [reference(each) for each in images]
    except (RuntimeError, AssertionError) as error:  # AssertionError: timm
        raise ValueError(
            f"the model does not take images of image_shape {list(image_shape)}: {error}"
        ) from error
    plain = _plain_ops_(reference)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        part = Path(folder) / ("model.onnx" if format == "onnx" else "model.pt2")
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # of the exporters, about themselves
                write(plain, images[1], part, text)
        except OSError:
            raise
        except Exception as error:  # they raise nearly anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RuntimeError(f"{type(model).__name__} cannot be exported as {format}: {reason}") from error
        run = reader(part)
        worst = max(_difference(run(x), y) for x, y in zip(images, expected, strict=True))
        if not worst <= tolerance:
            raise RuntimeError(
                f"the exported model must give the logits of PyTorch to {tolerance:g} of the largest one, "
                f"got a difference of {worst:.3g}; {path} was not written"
            )
        part.replace(path)
    return worst


def _plain_ops_(model: nn.Module) -> nn.Module:
    """Has convinit's modules compute by PyTorch's own operators, which any reader of the file has."""
    for module in model.modules():
        if isinstance(module, ConvInitAttention):
            # "eager" makes the map of Models II and III once for a batch, "sdpa" would for each image.
            module.backend = "eager" if module.variant in ("II", "III") else "sdpa"
    return model


def _traced(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    own = {
        str(node.target)
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if str(node.target).startswith("convinit")
    }
    if own:
        raise ValueError(f"its graph must have PyTorch's operators alone, got {', '.join(sorted(own))}")
    return program


def _write_program(model: nn.Module, images: Tensor, path: Path, metadata: str) -> None:
    torch.export.save(_traced(model, images), path, extra_files={"convinit": metadata})


def _read_program(path: Path) -> Callable[[Tensor], Tensor]:
    module = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return module(images)

    return run


def _write_onnx(model: nn.Module, images: Tensor, path: Path, metadata: str) -> None:
    program = torch.onnx.export(
        _traced(model, images),
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props["convinit"] = metadata
    program.save(path, external_data=False)


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return run


_WRITERS: dict[str, tuple[Callable[..., None], Callable[[Path], Callable[[Tensor], Tensor]]]] = {
    "torch-export": (_write_program, _read_program),
    "onnx": (_write_onnx, _read_onnx),
}


def _difference(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()


def _require_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"export to ONNX needs {name}, which cannot be imported ({error}); get it with: "
                "pip install 'convinit[export]'"
            ) from error
