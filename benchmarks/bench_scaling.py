"""How time grows: against tokens, batch, heads, layers, and the size of a fit.

    python -m pytest benchmarks/bench_scaling.py -s --benchmark-json scaling.json

One variable grows, everything else stays as in `BASE`. The report fits an exponent to each competitor's
times and draws them. Results are checked against the first competitor, which is the formula itself; the
benchmarks of the ops check against float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import papers
import pytest
import torch
from torch import Tensor

from convinit import fit_qk, impulse_matrix, impulse_targets, sample_offsets
from convinit.models import SimpleViT
from convinit.nn.position import sincos_2d
from convinit.ops.impulse_matrix import impulse_matrix_reference
from convinit.ops.positional_attention import positional_attention, positional_attention_reference
from convinit.ops.shared_attention import shared_attention, shared_attention_reference

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.slow] if CUDA else []
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
BASE = (
    {"B": 32, "heads": 8, "N": 256, "r": 64} if DEVICE == "cuda" else {"B": 4, "heads": 8, "N": 256, "r": 64}
)
ATTENTION = [
    *[{"N": n, "B": 1} for n in (64, 128, 256, 512, 1024, 2048, 4096)],
    *[{"B": b} for b in (1, 2, 4, 8, 16, 32)],
    *[{"heads": h} for h in (1, 2, 4, 8, 16)],
]


def seeded(device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def name(values: dict[str, int]) -> str:
    return ",".join(f"{key}={value}" for key, value in values.items())


def close_to_first(tolerance: float) -> Callable[[str, Tensor], dict[str, Any]]:
    """A check that every result is the first one, up to `tolerance` of its norm."""
    first: list[Tensor] = []

    def check(competitor: str, result: Tensor) -> dict[str, Any]:
        first.append(result.double()) if not first else None
        error = ((result.double() - first[0]).norm() / first[0].norm()).item()
        assert error <= tolerance, (competitor, error)
        return {"error": float(f"{error:.2g}")}

    return check


def swept(values: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """The whole problem, and the variable that grows: the first of `values`."""
    variable = next(iter(values))
    return {**BASE, **values}, {variable: values[variable]}


@pytest.mark.parametrize("values", ATTENTION, ids=name)
def bench_positional_attention_scaling(compare, values):
    size, sweep = swept(values)
    B, heads, N, r = (size[key] for key in ("B", "heads", "N", "r"))
    g = seeded(DEVICE)
    packed = torch.randn(B, N, 3, heads, r, device=DEVICE, generator=g).to(DTYPE)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    q_pos, k_pos = torch.randn(2, heads, N, r, device=DEVICE, generator=g).to(DTYPE)
    arguments = (q, k, v, q_pos, k_pos)
    compare(
        "positional_attention",
        f"[{B}, {heads}, {N}, {r}], forward",
        {
            "eager": lambda: positional_attention_reference(*arguments, alpha=0.4),
            "sdpa": lambda: positional_attention(*arguments, alpha=0.4, backend="sdpa"),
            "convinit": lambda: positional_attention(*arguments, alpha=0.4),
        },
        baseline="eager",
        check=close_to_first(0.02 if DTYPE == torch.bfloat16 else 1e-4),
        dtype=DTYPE,
        flops=4 * B * heads * N * N * r,
        sweep=sweep,
    )


@pytest.mark.parametrize("values", ATTENTION, ids=name)
def bench_shared_attention_scaling(compare, values):
    size, sweep = swept(values)
    B, heads, N, r = (size[key] for key in ("B", "heads", "N", "r"))
    g = seeded(DEVICE)
    v = torch.randn(B, N, heads, r, device=DEVICE, generator=g).to(DTYPE).transpose(1, 2)
    q_map, k_map = torch.randn(2, heads, N, r, device=DEVICE, generator=g).to(DTYPE)
    compare(
        "shared_attention",
        f"[{B}, {heads}, {N}, {r}], forward",
        {
            "eager": lambda: shared_attention_reference(q_map, k_map, v),
            "sdpa": lambda: shared_attention(q_map, k_map, v, backend="sdpa"),
            "convinit": lambda: shared_attention(q_map, k_map, v),
        },
        baseline="eager",
        check=close_to_first(0.02 if DTYPE == torch.bfloat16 else 1e-4),
        dtype=DTYPE,
        flops=2 * (B + 1) * heads * N * N * r,
        sweep=sweep,
    )


MATRICES = [
    *[{"N": n * n, "heads": 8} for n in (8, 16, 32, 64)],
    *[{"heads": h, "N": 256} for h in (1, 4, 16, 64, 256)],
]


@pytest.mark.parametrize("values", MATRICES, ids=name)
def bench_impulse_matrix_scaling(compare, values):
    side = round(values["N"] ** 0.5)
    offsets = sample_offsets(values["heads"], 5, generator=seeded()).to(DEVICE)
    variable = next(iter(values))
    compare(
        "impulse_matrix",
        f"{values['heads']} heads, {side}x{side}",
        {
            "reference": lambda: impulse_matrix_reference(offsets, (side, side), dtype=torch.float32),
            "convinit": lambda: impulse_matrix(offsets, (side, side)),
        },
        baseline="reference",
        check=close_to_first(0.0),
        bytes_moved=4 * values["heads"] * values["N"] ** 2,
        sweep={variable: values[variable]},
    )


ADAM_STEPS = 10  # with two, a third of the time at N = 64 would be that of setting up, multiplied as well
FITS = [
    *[{"N": n * n, "heads": 8} for n in (8, 12, 16, 24)],
    *[{"heads": h, "N": 256} for h in (8, 32, 128, 512)],
]


@pytest.mark.parametrize("values", FITS, ids=name)
def bench_qk_fit_scaling(compare, values):
    """Heads cost little: at most 25 offsets of a 5×5 window differ."""
    side, heads = round(values["N"] ** 0.5), values["heads"]
    P, offsets, g = sincos_2d((side, side), 512), sample_offsets(heads, 5, generator=seeded()), seeded()
    M, (wq, wk) = impulse_matrix(offsets[:8], (side, side)), papers.adam_weights(P, 8, 64, g)
    targets = impulse_targets(offsets, (side, side))
    variable = next(iter(values))

    def check(competitor: str, result: Any) -> dict[str, Any]:
        if competitor != "convinit":
            return {"steps_timed": ADAM_STEPS}
        attention = (0.1 * (P @ result.wq) @ (P @ result.wk).mT).softmax(dim=-1)
        inside = targets >= 0
        peak = attention.gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0][inside].mean().item()
        assert abs(peak - 0.7) < 0.02, peak
        return {"peak": round(peak, 4)}

    compare(
        "qk_fit",
        f"{heads} heads, {side}x{side}, D=512, r=64, peak 0.7",
        {
            "papers' adam": lambda: papers.adam_fit(P, M, wq, wk, scale=0.1, steps=ADAM_STEPS),
            "convinit": lambda: fit_qk(P, offsets, (side, side), 64, scale=0.1, peak=0.7),
        },
        baseline="papers' adam",
        check=check,
        extrapolate={"papers' adam": 10_000 / ADAM_STEPS * heads / 8},  # layer by layer, 8 heads each
        sweep={variable: values[variable]},
    )


MODELS = [
    *[{"layers": n, "B": 8} for n in (1, 2, 4, 8, 12)],
    *[{"B": b, "layers": 2} for b in (1, 2, 4, 8, 16, 32)],
]


@pytest.mark.parametrize("values", MODELS, ids=name)
def bench_model_scaling(compare, values):
    """SimpleViT, Model I: inference."""
    model = (
        SimpleViT(32, 2, 10, depth=values["layers"], method="random", generator=seeded()).to(DEVICE).eval()
    )
    theirs = papers.simple_vit(model)
    x = torch.randn(values["B"], 3, 32, 32, generator=seeded()).to(DEVICE)
    variable = next(iter(values))

    def infer(network: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            return network(x)

    compare(
        "models",
        f"Model I of {values['layers']} layers, batch {values['B']}, inference",
        {"papers' eager": lambda: infer(theirs), "convinit": lambda: infer(model)},
        baseline="papers' eager",
        check=close_to_first(1e-4),
        sweep={variable: values[variable]},
    )
