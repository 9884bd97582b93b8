"""fit_qk against the papers' own fits: time, and how good the maps are.

    python -m pytest benchmarks/bench_qk_fit.py -s --rows rows.csv

"papers' adam" is the loop of arXiv 2401.12511 in eager PyTorch with autograd. A few of its 10,000 steps are
timed and multiplied; what the papers' own code ended with on this case is in tests/data/official_fit.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convinit import QKFit, fit_qk, impulse_matrix, sample_offsets
from convinit.nn.position import sincos_2d

OFFICIAL = json.loads((Path(__file__).parent.parent / "tests" / "data" / "official_fit.json").read_text())
ADAM_STEPS = 10


def learned(tokens: int, dim: int) -> Tensor:
    P = torch.nn.init.trunc_normal_(torch.empty(tokens, dim), std=0.02, generator=seeded())
    return F.layer_norm(P, (dim,))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def window(kernel_size: int) -> Tensor:
    reach = torch.arange(-(kernel_size // 2), kernel_size // 2 + 1)
    return torch.cartesian_prod(reach, reach)


def papers_adam(
    P: Tensor, offsets: Tensor, grid_size: tuple[int, int], rank: int, scale: float, steps: int
) -> None:
    """The papers' loop for one layer: autograd through the N x N maps of all heads."""
    M, heads, bound = impulse_matrix(offsets, grid_size), len(offsets), (1 / (rank * len(offsets))) ** 0.5
    wq = torch.empty(heads, P.shape[1], rank).uniform_(-bound, bound).requires_grad_()
    wk = torch.empty(heads, rank, P.shape[1]).uniform_(-bound, bound).requires_grad_()
    norm = wq.detach().norm(dim=1).mean()
    optimizer = torch.optim.Adam([wq, wk], lr=1e-4)
    for step in range(steps):
        if step % 100 == 0:
            for w in (wq.data, wk.data):
                w *= norm / w.norm(dim=1, keepdim=True)
        optimizer.zero_grad()
        F.mse_loss(torch.softmax(scale * (P @ wq) @ (wk @ P.T), dim=-1), M).backward()
        optimizer.step()


def facts(fit: QKFit) -> dict[str, float]:
    return {
        "mse": float(f"{fit.mse.mean():.4g}"),
        "mse_worst": float(f"{fit.mse.max():.4g}"),
        "peak": round(fit.peak.mean().item(), 4),
        "peak_lowest": round(fit.peak.min().item(), 4),
        "hit_rate": round(fit.hit_rate.mean().item(), 4),
        "weight_norm": round(fit.weight_norm.mean().item(), 3),
    }


def bench_baseline(compare):
    """The papers' case: 6 layers of 8 heads at the weight norm that the papers' own fit ends with."""
    P, grid_size, scale = sincos_2d((16, 16), 512), (16, 16), 0.1
    offsets = sample_offsets(48, 5, generator=seeded())

    def check(name: str, fit: QKFit | None) -> dict[str, float]:
        if fit is None:
            return {"steps_timed": ADAM_STEPS}
        assert fit.mse.mean() <= 1.5e-4 and (fit.hit_rate == 1).all()
        return facts(fit)

    compare(
        "qk_fit",
        "6 layers x 8 heads, 16x16, D=512, r=64, f=5, scale 0.1, weight_norm 8.77",
        {
            "papers' adam": lambda: papers_adam(P, offsets[:8], grid_size, 64, scale, ADAM_STEPS),
            "convinit": lambda: fit_qk(P, offsets, grid_size, 64, scale=scale, weight_norm=8.77),
        },
        baseline="papers' adam",
        check=check,
        extrapolate={"papers' adam": 6 * OFFICIAL["case"]["steps"] / ADAM_STEPS},
    )


def bench_each_offset(compare):
    """The 25 offsets of the window in 25 calls."""
    P = sincos_2d((16, 16), 512)

    def one_by_one() -> list[QKFit]:
        return [fit_qk(P, offset[None], (16, 16), 64, scale=0.1, weight_norm=8.77) for offset in window(5)]

    def check(name: str, fits: list[QKFit]) -> dict[str, float]:
        mse = torch.cat([fit.mse for fit in fits])
        assert mse.max() <= 1.6e-4 and all(fit.hit_rate == 1 for fit in fits)
        return {"mse": float(f"{mse.mean():.4g}"), "mse_worst": float(f"{mse.max():.4g}"), "hit_rate": 1.0}

    compare(
        "qk_fit", "25 offsets one by one, 16x16, D=512, r=64, scale 0.1, weight_norm 8.77",
        {"convinit": one_by_one}, baseline="convinit", check=check,
    )  # fmt: skip


def bench_learned(compare):
    """A timm ViT-Tiny's learned embedding: 12 layers of 3 heads at the norm of the papers' svd."""
    P, offsets = learned(196, 192), sample_offsets(36, 3, generator=seeded())

    def check(name: str, fit: QKFit) -> dict[str, float]:
        assert name != "convinit" or (fit.peak.mean() >= 0.97 and (fit.hit_rate == 1).all())
        return facts(fit)

    compare(
        "qk_fit",
        "12 layers x 3 heads, learned 14x14, D=192, r=64, f=3, scale 1/8, weight_norm 7",
        {
            "papers' svd": lambda: fit_qk(P, offsets, (14, 14), 64, scale=1 / 8, method="svd"),
            "convinit": lambda: fit_qk(P, offsets, (14, 14), 64, scale=1 / 8, weight_norm=7.0),
        },
        baseline="papers' svd",
        check=check,
    )


CASES = [
    # name, embedding, grid, rank, scale
    ("8x8, D=64, r=16", sincos_2d((8, 8), 64), (8, 8), 16, 0.25),
    ("16x16, D=512, r=16", sincos_2d((16, 16), 512), (16, 16), 16, 0.1),
    ("16x16, D=512, r=32", sincos_2d((16, 16), 512), (16, 16), 32, 0.1),
    ("16x16, D=512, r=64, scale 0.05", sincos_2d((16, 16), 512), (16, 16), 64, 0.05),
    ("16x16, D=512, r=64, scale 1", sincos_2d((16, 16), 512), (16, 16), 64, 1.0),
    ("12x20, D=192, r=64", sincos_2d((12, 20), 192), (12, 20), 64, 0.125),
    ("24x24, D=384, r=64", sincos_2d((24, 24), 384), (24, 24), 64, 0.125),
    ("32x32, D=64, r=64", sincos_2d((32, 32), 64), (32, 32), 64, 0.125),
    ("learned 14x14, D=768, r=64", learned(196, 768), (14, 14), 64, 0.125),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def bench_peak(compare, case):
    """All nine offsets of a 3 x 3 window at peak 0.9, in float32; the figures at other peaks beside it."""
    name, P, grid_size, rank, scale = case

    def fit(peak: float = 0.9, dtype: torch.dtype = torch.float32) -> QKFit:
        return fit_qk(P.to(dtype), window(3), grid_size, rank, scale=scale, peak=peak)

    def check(_: str, result: QKFit) -> dict[str, float]:
        for wanted, other in [
            (0.9, result),
            (0.9, fit(dtype=torch.float64)),
            (0.5, fit(0.5)),
            (0.99, fit(0.99)),
        ]:
            assert (other.peak - wanted).abs().max() < 0.02, (wanted, other)
        return facts(result)

    compare("qk_fit", f"9 heads, {name}, peak 0.9", {"convinit": fit}, baseline="convinit", check=check)
