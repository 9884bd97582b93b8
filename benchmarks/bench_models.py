"""Whole models: images a second, in inference and in training steps.

    python -m pytest benchmarks/bench_models.py -s --benchmark-json models.json

SimpleViT and its Models I, II and III at the size of arXiv 2401.12511 against the papers' eager code with
the same weights (on GPUs also with PyTorch's fused attention and compiled, on CPUs where it matters with our
linear layers), and against other libraries' Vision Transformers of that size. Logits and gradients are
checked against float64.

A training step is forward, cross-entropy, backward and fused AdamW. bfloat16 is autocast. The other
libraries' models compute something else of the same size: they are checked for finite logits alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import papers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convinit._timing import Absent, compiled
from convinit.models import SimpleViT
from convinit.nn._linear import Linear
from convinit.ops.cpu_products import MKL_USES_HALF_VECTORS

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = "cuda" if CUDA else "cpu"
BATCH = {"cpu": 16, "cuda": 512}[DEVICE]  # 512: the papers'
IMAGE, PATCH, CLASSES = 32, 2, 10
SIZE = {"dim": 512, "depth": 6, "mlp_dim": 512}
FEW = 4  # images that gradients are checked on

FLOAT32 = pytest.param(torch.float32, marks=pytest.mark.slow if CUDA else ())  # nobody trains in it on a GPU
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT32], ids=str)
DIRECTIONS = pytest.mark.parametrize("direction", ["inference", "training"])

Model = Callable[[Tensor], Tensor]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def images(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """Images [B, 3, 32, 32] and labels [B]; noise, as nothing here depends on what they show."""
    g = seeded()
    x = torch.randn(batch, 3, IMAGE, IMAGE, generator=g)
    return x.to(DEVICE), torch.randint(CLASSES, (batch,), generator=g).to(DEVICE)


def run(model: Model, dtype: torch.dtype, direction: str, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """One inference or one training step, returning the logits."""
    autocast = functools.partial(torch.autocast, DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16)
    if direction == "inference":

        @torch.no_grad()
        def infer() -> Tensor:
            with autocast():
                return model(x)

        return infer

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)  # the weights stay checked

    def step() -> Tensor:
        optimizer.zero_grad()
        with autocast():
            logits = model(x)
            loss = F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        return logits.detach()

    return step


def simple_vit(variant: str, **options: Any) -> SimpleViT:
    return SimpleViT(
        IMAGE, PATCH, CLASSES, **SIZE, variant=variant, method="random", generator=seeded(), **options
    ).to(DEVICE)


def vit_pytorch_simple_vit() -> nn.Module | Absent:
    try:
        from vit_pytorch import SimpleViT as TheirSimpleViT
    except ImportError as error:
        return Absent(f"{error}")
    torch.manual_seed(0)
    return TheirSimpleViT(
        image_size=IMAGE, patch_size=PATCH, num_classes=CLASSES, heads=8, dim_head=64, **SIZE
    ).to(DEVICE)


def timm_vit() -> nn.Module | Absent:
    try:
        from timm.models import VisionTransformer
    except ImportError as error:
        return Absent(f"{error}")
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=IMAGE,
        patch_size=PATCH,
        num_classes=CLASSES,
        embed_dim=512,
        depth=6,
        num_heads=8,
        mlp_ratio=1,
        qkv_bias=False,
        class_token=False,
        global_pool="avg",
    ).to(DEVICE)


def check_models(
    models: dict[str, nn.Module | Absent], reference: nn.Module, dtype: torch.dtype, direction: str
) -> Callable[[str, Tensor], dict[str, Any]]:
    """A check of logits, and for training of the patch embedding's gradient, against `reference` in float64.

    The limit is a small multiple of the error that the reference itself makes in `dtype`.
    """
    x, y = images(FEW)
    exact = copy.deepcopy(reference).double()

    def results(model: nn.Module, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        weight = next(p for p in model.parameters() if p.requires_grad)  # all else comes after it
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(x)
            loss = F.cross_entropy(logits, y)
        (gradient,) = torch.autograd.grad(loss, weight)
        return [logits.detach(), gradient]

    expected = results(exact, x.double(), torch.float64)

    def errors(model: nn.Module) -> list[float]:
        found = results(model, x, dtype)
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]

    limits = [3 * error + 1e-6 for error in errors(reference)]

    def check(name: str, logits: Tensor) -> dict[str, Any]:
        model = models[name]
        assert not isinstance(model, Absent)
        assert logits.shape == (BATCH, CLASSES) and logits.isfinite().all(), name
        if name in ANOTHER_FUNCTION:
            return {}
        found = errors(model)
        assert all(e <= limit for e, limit in zip(found, limits, strict=True)), (name, found, limits)
        return {"error": float(f"{max(found):.2g}")}

    return check


ANOTHER_FUNCTION = ("vit-pytorch", "timm")

VARIANTS = {
    "SimpleViT": ("vanilla", {}),
    "Model I": ("I", {}),
    "Model II": ("II", {}),
    "Model III": ("III", {}),
    "Model II without values and output layer": ("II", {"value": False, "proj": False}),
}


@DIRECTIONS
@DTYPES
@pytest.mark.parametrize("name", VARIANTS)
def bench_simple_vit(compare, name, dtype, direction):
    variant, options = VARIANTS[name]
    ours = simple_vit(variant, **options)
    models: dict[str, nn.Module | Absent] = {"papers' eager": papers.simple_vit(ours), "convinit": ours}
    if MKL_USES_HALF_VECTORS:  # what is left of the ratio when theirs gets our linear layers
        models["papers' eager, our Linear"] = papers.simple_vit(ours, Linear)
    if DEVICE == "cuda":  # minutes of compilation on two CPU cores
        if variant in ("vanilla", "I"):  # the others' queries and keys have no batch, which SDPA repeats
            models["papers' with SDPA"] = papers.simple_vit(ours, sdpa=True)
            models["papers' with SDPA, compiled"] = compiled(papers.simple_vit(ours, sdpa=True))
        models["papers' eager, compiled"] = compiled(papers.simple_vit(ours))
        models["convinit, compiled"] = compiled(copy.deepcopy(ours))
    if variant == "vanilla":
        models["vit-pytorch"], models["timm"] = vit_pytorch_simple_vit(), timm_vit()
    measure(
        compare, f"{name}, {direction}", models, models["papers' eager"], dtype, direction, "papers' eager"
    )


def measure(
    compare: Any,
    problem: str,
    models: dict[str, nn.Module | Absent],
    reference: nn.Module,
    dtype: torch.dtype,
    direction: str,
    baseline: str,
) -> None:
    x, y = images()
    compare(
        "models",
        f"{problem}, batch {BATCH}",
        {
            name: model if isinstance(model, Absent) else run(model, dtype, direction, x, y)
            for name, model in models.items()
        },
        baseline=baseline,
        check=check_models(models, reference, dtype, direction),
        dtype=dtype,
        images=BATCH,
    )
