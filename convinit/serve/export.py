"""A model as one file for programs without convinit: torch.export or ONNX, checked against PyTorch."""

from __future__ import annotations

import contextlib
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

from convinit._checks import check_int, check_real
from convinit._files import empty_removed
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
    if not 0 <= check_real("tolerance", tolerance):
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    if not isinstance(image_shape, list | tuple) or len(image_shape) != 3:
        raise TypeError(f"image_shape must be (C, H, W), got {image_shape!r}")
    image_shape = [check_int("image_shape", each) for each in image_shape]
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
    _set_backends_(reference, "auto", "auto")  # one that was chosen may need a GPU
    try:
        with torch.inference_mode():
            expected = [reference(each) for each in images]
    except (RuntimeError, AssertionError) as error:  # AssertionError: timm
        raise ValueError(
            f"the model does not take images of image_shape {list(image_shape)}: {error}"
        ) from error
    # Plain operators, which any reader of the file has. "eager" makes the map of Models II and III once for a
    # batch, "sdpa" would for each image.
    _set_backends_(reference, "sdpa", shared="eager")
    path = Path(path)
    with contextlib.ExitStack() as stack:
        stack.enter_context(empty_removed(path.parent))
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent))
        part = Path(folder) / ("model.onnx" if format == "onnx" else "model.pt2")
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # of the exporters, about themselves
                write(reference, images[1], part, text)
        except OSError:
            raise
        except Exception as error:  # they raise nearly anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RuntimeError(f"{type(model).__name__} cannot be exported as {format}: {reason}") from error
        run = reader(part)
        differences = [_difference(run(x), y) for x, y in zip(images, expected, strict=True)]
        worst = torch.tensor(differences, dtype=torch.float64).max().item()  # Python's max may lose a NaN
        if not worst <= tolerance:
            raise RuntimeError(
                f"the exported model must give the logits of PyTorch to {tolerance:g} of the largest one, "
                f"got a difference of {worst:.3g}; {path} was not written"
            )
        part.replace(path)
    return worst


def _set_backends_(model: nn.Module, own: str, shared: str) -> None:
    """The backends of attention whose maps are an image's own, and of the variants that share one."""
    for module in model.modules():
        if isinstance(module, ConvInitAttention):
            module.backend = shared if module.variant in ("II", "III") else own


def _traced(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    program = torch.export.export(model, (images,), dynamic_shapes=_dynamic())
    graphs = [each.graph for each in program.graph_module.modules() if isinstance(each, torch.fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes]
    own = {str(node.target) for node in nodes if str(node.target).startswith("convinit")}
    if own:
        raise ValueError(f"its graph must have PyTorch's operators alone, got {', '.join(sorted(own))}")
    for node in nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _dynamic() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch", min=1)},)


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
        dynamic_shapes=_dynamic(),  # for the dimension's name
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
