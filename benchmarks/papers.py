"""What the papers' code computes, written anew in plain PyTorch: what the benchmarks compare convinit with.

Operations, their order and what is computed again for every image follow the code of arXiv 2401.12511,
since its cost is what is measured. A model here takes its weights from a model of ours, so both compute the
same function.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convinit.models import SimpleViT
from convinit.nn import ConvInitAttention


def impulse_matrix_loops(cells: Tensor, kernel_size: int, grid_size: tuple[int, int]) -> Tensor:
    """Impulse matrices [B, N, N] by loops over heads and blocks; `cells` [B] number the window's cells.

    Their code is for square grids; height and width are told apart here.
    """
    height, width = grid_size
    weight = torch.zeros(len(cells), height * width, height * width)
    for head in range(len(cells)):
        dy = cells[head] // kernel_size - kernel_size // 2
        dx = cells[head] % kernel_size - kernel_size // 2
        row = torch.zeros(width, width)
        for j in range(0 - min(0, dx), width - max(0, dx)):
            row[j, j + dx] = 1
        for i in range(0 - min(0, dy), height - max(0, dy)):
            weight[head, i * width : (i + 1) * width, (i + dy) * width : (i + dy + 1) * width] = row
    return weight


def adam_weights(P: Tensor, heads: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Where their fit starts: W_q [heads, D, r] and W_k [heads, r, D], uniform."""
    bound = (1 / (rank * heads)) ** 0.5
    wq, wk = torch.empty(heads, P.shape[1], rank), torch.empty(heads, rank, P.shape[1])
    for weight in (wq, wk):
        weight.uniform_(-bound, bound, generator=generator)
    return wq.to(P.device), wk.to(P.device)


def adam_fit(
    P: Tensor, M: Tensor, wq: Tensor, wk: Tensor, *, scale: float, steps: int, well_ordered: bool = False
) -> tuple[Tensor, Tensor]:
    """Their fit of one layer: Adam through the N×N maps of all heads, the weights normalised every 100 steps.

    Their logits are P W_q W_k Pᵀ from left to right, through [N, D] of every head. `well_ordered` multiplies
    (P W_q)(W_k Pᵀ) instead, which nobody's code does but anybody's could.

    Returns:
        W_q and W_k, both [heads, D, r].
    """
    wq, wk = wq.clone(), wk.clone()
    norm = wq.norm(dim=1).mean()
    wq.requires_grad_(), wk.requires_grad_()
    optimizer = torch.optim.Adam([wq, wk], lr=1e-4)
    for step in range(steps):
        if step % 100 == 0:
            with torch.no_grad():
                wq.mul_(norm / wq.norm(dim=1, keepdim=True))
                wk.mul_(norm / wk.norm(dim=1, keepdim=True))
        optimizer.zero_grad()
        logits = (P @ wq) @ (wk @ P.T) if well_ordered else P @ wq @ wk @ P.T
        F.mse_loss(torch.softmax(scale * logits, dim=-1), M).backward()
        optimizer.step()
    return wq.detach(), wk.detach().mT


def simple_vit(model: SimpleViT, linear: type[nn.Linear] = nn.Linear, sdpa: bool = False) -> nn.Module:
    """A copy of a SimpleViT whose layers compute as the papers' do, with parameters of their own.

    Args:
        linear: the class of its linear layers.
        sdpa: PyTorch's fused attention in place of their softmax.
    """
    theirs = copy.deepcopy(model)
    for block in theirs.blocks:
        block.attn = Attention(block.attn, sdpa)  # type: ignore[assignment]
    for module in theirs.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = linear
    return theirs


class Attention(nn.Module):
    """The attention of their SimpleViT and Models I to III: x [B, N, D] → [B, N, D].

    The mix α·x + (1−α)·P is taken before the projection, for every image. Model II projects P once an image,
    Model III multiplies its free Q and K once a batch.
    """

    pos_embed: Tensor

    def __init__(self, ours: ConvInitAttention, sdpa: bool) -> None:
        super().__init__()
        self.sdpa = sdpa
        self.variant, self.alpha, self.scale = ours.variant, ours.alpha, ours.scale
        self.num_heads = ours.num_heads
        inner = ours.num_heads * ours.head_dim
        if ours.variant == "III":
            self.q_map = nn.Parameter(ours.q_map.detach().clone())  # [heads, N, r]
            self.k_map = nn.Parameter(ours.k_map.detach().clone())  # [heads, r, N]
        else:
            self.qk = _linear((ours.qk if ours.qkv is None else ours.qkv).weight[: 2 * inner])
        if ours.qkv is not None:
            self.v = _linear(ours.qkv.weight[2 * inner :])
        else:
            self.v = nn.Identity() if ours.v is None else _linear(ours.v.weight)
        self.proj = _linear(ours.proj.weight) if isinstance(ours.proj, nn.Linear) else nn.Identity()
        if ours.variant in ("I", "II"):
            self.register_buffer("pos_embed", ours.pos_embed.clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        v = self._heads(self.v(x))
        if self.variant == "III":
            q, k = self.q_map, self.k_map.mT
        else:
            if self.variant == "I":
                x = self.alpha * x + (1 - self.alpha) * self.pos_embed
            elif self.variant == "II":
                x = 0 * x + self.pos_embed
            q, k = map(self._heads, self.qk(x).chunk(2, dim=-1))
        if self.sdpa:
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            out = torch.matmul((torch.matmul(q, k.mT) * self.scale).softmax(dim=-1), v)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer
