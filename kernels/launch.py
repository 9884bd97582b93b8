"""The host side of the kernels: shapes, strides, outputs and grids. No autograd and no argument checks here.

Every tensor reaches a kernel as a [B, heads, N, r] view with its four strides; none is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from convinit.kernels import configs
from convinit.kernels.layout import image_gradient, split_heads
from convinit.kernels.positional_attention import backward_kernel, forward_kernel
from convinit.kernels.shared_attention import apply_kernel, map_gradient_kernel

Strides = tuple[int, ...]
NO_STRIDES: Strides = (0, 0, 0, 0)


def positional_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    seed: Tensor | None,
    scale: float,
    alpha: float,
    dropout_p: float,
    config: configs.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, N, heads·r] and base-2 log-sum-exp [B, heads, N]. seed: int64 scalar below 2³¹, or None."""
    batch, heads, tokens, rank = q.shape
    out = q.new_empty(batch, tokens, heads * rank)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    if lse.numel() == 0 or rank == 0:
        return out, lse
    config = config or configs.choose("forward" if seed is None else "forward_dropout", q)
    blocks = triton.cdiv(tokens, config.BM)
    # Where images and heads alone do not fill the device, a head's queries go to several programs.
    programs = min(blocks, triton.cdiv(programs_at_once(q, config), batch * heads))
    if config.BN < tokens:
        programs = blocks
    forward_kernel[(batch * heads, programs)](
        q,
        k,
        v,
        q_pos,
        k_pos,
        out,
        lse,
        seed,
        q.stride(),
        k.stride(),
        v.stride(),
        position_strides(q_pos),
        position_strides(k_pos),
        split_heads(out, heads).stride(),
        heads,
        tokens,
        folded_scale(scale, alpha, q_pos, k_pos),
        float(alpha),
        float(dropout_p),
        R=rank,
        BM=config.BM,
        BN=config.BN,
        BR=padded(rank),
        ALL_KEYS=config.BN >= tokens,
        PRECISION=precision(q),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, lse


def positional_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    scale: float,
    alpha: float,
    dropout_p: float,
    needs: Sequence[bool],
    config: configs.Config | None = None,
    image_gradients: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, q_pos, k_pos; None where needs says False.

    image_gradients: where those of q, k and v are to be written, all three; None makes new tensors.
    """
    batch, heads, tokens, rank = q.shape
    need_q, need_k, need_v, need_q_pos, need_k_pos = needs
    dq, dk, dv = image_gradients or (image_gradient(q) if need else None for need in needs[:3])
    if lse.numel() == 0 or rank == 0 or not any(needs):
        positions = ((q_pos, need_q_pos), (k_pos, need_k_pos))
        return dq, dk, dv, *(torch.zeros_like(x) if need and x is not None else None for x, need in positions)

    config = config or configs.choose("backward" if seed is None else "backward_dropout", q)
    all_keys = config.BN >= tokens
    splits = min(batch, triton.cdiv(programs_at_once(q, config), heads))
    needs_part = (need_q or need_q_pos) and not all_keys
    dq_part, dq_pos, dk_pos = (
        q.new_empty(splits, heads, tokens, rank, dtype=torch.float32) if need else None
        for need in (needs_part, need_q_pos, need_k_pos)
    )
    backward_kernel[(heads * splits,)](
        q,
        k,
        v,
        q_pos,
        k_pos,
        out,
        dout,
        lse,
        seed,
        dq,
        dk,
        dv,
        dq_part,
        dq_pos,
        dk_pos,
        q.stride(),
        k.stride(),
        v.stride(),
        position_strides(q_pos),
        position_strides(k_pos),
        split_heads(out, heads).stride(),
        split_heads(dout, heads).stride(),
        strides(dq),
        strides(dk),
        strides(dv),
        (heads * tokens * rank, tokens * rank, rank, 1),
        batch,
        heads,
        tokens,
        folded_scale(scale, alpha, q_pos, k_pos),
        float(alpha),
        float(dropout_p),
        R=rank,
        BM=config.BM,
        BN=config.BN,
        BR=padded(rank),
        ALL_KEYS=all_keys,
        PRECISION=precision(q),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dq, dk, dv, sum_of_splits(dq_pos, q_pos), sum_of_splits(dk_pos, k_pos)


def apply_map(attention: Tensor, v: Tensor, config: configs.Config | None = None) -> Tensor:
    """attention [heads, N, N] · v [B, heads, N, r] → [B, N, heads·r]. One dtype; any strides."""
    batch, heads, tokens, rank = v.shape
    out = v.new_empty(batch, tokens, heads * rank)
    if out.numel() == 0:
        return out
    config = config or configs.choose("apply", v)
    blocks = triton.cdiv(tokens, config.BM)
    splits = min(batch, triton.cdiv(programs_at_once(v, config), heads * blocks))
    apply_kernel[(heads * splits, blocks)](
        attention,
        v,
        out,
        attention.unsqueeze(0).stride(),
        v.stride(),
        split_heads(out, heads).stride(),
        batch,
        heads,
        tokens,
        R=rank,
        BM=config.BM,
        BN=config.BN,
        BR=padded(rank),
        WHOLE_ROWS=config.BN >= tokens,
        PRECISION=precision(v),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def map_gradient(dout: Tensor, v: Tensor, config: configs.Config | None = None) -> Tensor:
    """Σ over images of dout · vᵀ: dout [B, N, heads·r], v [B, heads, N, r] → [heads, N, N], in v's dtype."""
    batch, heads, tokens, rank = v.shape
    if v.numel() == 0:
        return v.new_zeros(heads, tokens, tokens)
    config = config or configs.choose("map_gradient", v)
    rows, columns = triton.cdiv(tokens, config.BM), triton.cdiv(tokens, config.BN)
    splits = min(batch, triton.cdiv(programs_at_once(v, config), heads * rows * columns))
    parts = v.new_empty(splits, heads, tokens, tokens, dtype=torch.float32)
    map_gradient_kernel[(heads * splits, rows, columns)](
        dout,
        v,
        parts,
        split_heads(dout, heads).stride(),
        v.stride(),
        parts.stride(),
        batch,
        heads,
        tokens,
        R=rank,
        BM=config.BM,
        BN=config.BN,
        BR=padded(rank),
        PRECISION=precision(v),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return parts.sum(0).to(v.dtype)


def padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))  # tensor cores take no less than 16


def precision(x: Tensor) -> str:
    """How float32 products are made; without meaning for 16-bit inputs."""
    if x.dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def folded_scale(scale: float, alpha: float, q_pos: Tensor | None, k_pos: Tensor | None) -> float:
    """The logits' factor: a side without position term has its α here, unrounded."""
    return scale * alpha ** ((q_pos is None) + (k_pos is None))


def programs_at_once(x: Tensor, config: configs.Config) -> int:
    """Programs that the device runs at a time, if 8 warps use up the registers of a multiprocessor.

    The sums over images have as many parts, so on one device the order of addition never changes.
    """
    if x.device.type != "cuda":
        return 4  # Triton's interpreter
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return processors * max(1, 8 // config.num_warps)


def strides(x: Tensor | None) -> Strides:
    return NO_STRIDES if x is None else x.stride()


def position_strides(position: Tensor | None) -> Strides:
    return NO_STRIDES if position is None else position.unsqueeze(0).stride()


def sum_of_splits(parts: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if parts is None or like is None else parts.sum(0).to(like.dtype)
