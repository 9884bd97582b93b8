"""The host side of the kernels: shapes, strides, outputs and grids. No autograd and no argument checks here.

Every tensor reaches a kernel as a [B, heads, N, r] view with its four strides; none is copied.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from convinit.kernels import tuned
from convinit.kernels.configs import Config, key_blocks, power_of_two
from convinit.kernels.positional_attention import (
    backward_kernel,
    backward_keys_kernel,
    backward_queries_kernel,
    forward_kernel,
    sum_images_kernel,
)
from convinit.kernels.shared_attention import apply_kernel, map_gradient_kernel
from convinit.kernels.tensor_views import image_gradient, split_heads

T = TypeVar("T", Tensor, Tensor | None)
Strides = tuple[int, ...]
Chosen = Mapping[str, Config]  # {kernel: configuration}, in place of the table's
NO_STRIDES: Strides = (0, 0, 0, 0)
TINY = torch.finfo(torch.float32).tiny
SMALL_ALPHA = 2**-6  # below it α dQ is not kept in 16 bits in place of dQ
IMAGES, ELEMENTS = 32, 256  # tile of the sum over images
WAVES = 3  # at most, of programs that keep something on chip from image to image


def positional_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    scale: float,
    alpha: float,
    chosen: Chosen | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, N, heads·r] and base-2 log-sum-exp [B, heads, N]."""
    batch, heads, tokens, rank = q.shape
    out = q.new_empty(batch, tokens, heads * rank)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    if lse.numel() == 0 or rank == 0:
        return out, lse
    config = tuned.choose("forward", q, chosen)
    scale = folded_scale(scale, alpha, q_pos, k_pos)
    if scale < 0:  # the kernel takes a row's maximum before it multiplies by the scale
        q, q_pos, scale = -q, None if q_pos is None else -q_pos, -scale
    scale = max(scale, TINY)  # the kernel multiplies masked logits by it, and 0 · −∞ is no number
    blocks = key_blocks(tokens, config.BN, q.element_size())
    programs = cdiv(tokens, config.BM)
    if blocks:  # one program a head, unless images and heads alone leave multiprocessors idle
        programs = max(1, min(programs, multiprocessors(q) * config.programs // (batch * heads)))
    q, k, v = reachable(q), reachable(k), reachable(v)
    q_pos, k_pos = reachable(q_pos), reachable(k_pos)
    forward_kernel[(batch * heads * programs,)](
        q,
        k,
        v,
        q_pos,
        k_pos,
        out,
        lse,
        q.stride(),
        k.stride(),
        v.stride(),
        position_strides(q_pos),
        position_strides(k_pos),
        split_heads(out, heads).stride(),
        heads,
        programs,
        tokens,
        scale,
        float(alpha),
        BLOCKS=blocks,
        **tiles(config, q, sum(blocks)),
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
    scale: float,
    alpha: float,
    needs: Sequence[bool],
    image_gradients: tuple[Tensor, Tensor, Tensor] | None = None,
    chosen: Chosen | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, q_pos, k_pos; None where needs says False.

    image_gradients: where those of q, k and v are to be written, all three; None makes new tensors.
    """
    batch, heads, tokens, rank = q.shape
    need_q, need_k, need_v, need_q_pos, need_k_pos = needs
    if lse.numel() == 0 or rank == 0 or not any(needs):
        dq, dk, dv = image_gradients or (image_gradient(q) if need else None for need in needs[:3])
        positions = ((q_pos, need_q_pos), (k_pos, need_k_pos))
        return (
            dq,
            dk,
            dv,
            *(x.new_zeros(x.shape) if need and x is not None else None for x, need in positions),
        )
    # The position terms' gradients are sums of dq and dk, so these are written for them, too.
    written = (need_q or need_q_pos, need_k or need_k_pos, need_v)
    dq, dk, dv = image_gradients or (image_gradient(q) if need else None for need in written)

    folded = folded_scale(scale, alpha, q_pos, k_pos)
    factor = float(alpha) if abs(alpha) >= SMALL_ALPHA else 1.0  # a sum of α dQ with α = 0 says nothing of dQ
    dq_scale = folded * (factor if q_pos is not None else 1.0)
    dk_scale = folded * (factor if k_pos is not None else 1.0)
    q, k, v = reachable(q), reachable(k), reachable(v)
    q_pos, k_pos = reachable(q_pos), reachable(k_pos)
    dout = reachable(split_heads(dout, heads))
    sources = (q, k, v, q_pos, k_pos)
    source_strides = (q.stride(), k.stride(), v.stride(), position_strides(q_pos), position_strides(k_pos))
    out_strides = split_heads(out, heads).stride()
    common = (heads, tokens, folded, float(alpha))
    at_once = tuned.find("backward", q, chosen)
    if at_once is not None:
        backward_kernel[(batch * heads,)](
            *sources, out, dout, lse, dq, dk, dv,
            *source_strides, out_strides, dout.stride(), strides(dq), strides(dk), strides(dv),
            *common, dq_scale, dk_scale, **tiles(at_once, q),
        )  # fmt: skip
    else:
        delta = torch.empty_like(lse)
        if dq is not None or dk is not None:
            config = tuned.choose("backward_queries", q, chosen)
            backward_queries_kernel[(batch * heads * cdiv(tokens, config.BM),)](
                *sources, out, dout, lse, delta, dq,
                *source_strides, out_strides, dout.stride(), strides(dq),
                *common, dq_scale, **tiles(config, q),
            )  # fmt: skip
        if dk is not None or dv is not None:
            config = tuned.choose("backward_keys", q, chosen)
            backward_keys_kernel[(batch * heads * cdiv(tokens, config.BN),)](
                *sources, dout, lse, delta, dk, dv,
                *source_strides, dout.stride(), strides(dk), strides(dv),
                *common, dk_scale, **tiles(config, q),
            )  # fmt: skip

    dq_pos, dk_pos = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else None
        for x, need in ((q_pos, need_q_pos), (k_pos, need_k_pos))
    )
    if dq_pos is not None or dk_pos is not None:
        sum_images_kernel[(cdiv(heads * tokens * rank, ELEMENTS), 2)](
            dq, dk, dq_pos, dk_pos, strides(dq), strides(dk), batch, heads, tokens, 1 / factor, 1 / factor,
            R=rank, BB=IMAGES, BE=ELEMENTS, num_warps=4,
        )  # fmt: skip
    if factor != alpha:
        for gradient, position in ((dq, q_pos), (dk, k_pos)):
            if gradient is not None and position is not None:
                gradient.mul_(alpha)
    return dq if need_q else None, dk if need_k else None, dv, dq_pos, dk_pos


def apply_map(attention: Tensor, v: Tensor, chosen: Chosen | None = None) -> Tensor:
    """attention [heads, N, N] · v [B, heads, N, r] → [B, N, heads·r]. One dtype; any strides."""
    batch, heads, tokens, rank = v.shape
    out = v.new_empty(batch, tokens, heads * rank)
    if out.numel() == 0:
        return out
    config = tuned.find("apply", v, chosen)
    if config is None:  # a map that is too large to stay on chip: cuBLAS, head by head, without copies
        for h, result in enumerate(split_heads(out, heads).unbind(1)):
            torch.bmm(attention[h].expand(batch, -1, -1), v[:, h], out=result)
        return out
    blocks = cdiv(tokens, config.BM)
    splits = shares(batch, heads * blocks, config, v)
    v, attention = reachable(v), reachable(attention)
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
        **tiles(config, v),
    )
    return out


def map_gradient(dout: Tensor, v: Tensor, chosen: Chosen | None = None) -> Tensor:
    """Σ over images of dout · vᵀ: dout [B, N, heads·r], v [B, heads, N, r] → [heads, N, N], in v's dtype."""
    batch, heads, tokens, rank = v.shape
    if v.numel() == 0:
        return v.new_zeros(heads, tokens, tokens)
    config = tuned.choose("map_gradient", v, chosen)
    rows, columns = cdiv(tokens, config.BM), cdiv(tokens, config.BN)
    splits = shares(batch, heads * rows * columns, config, v)
    parts = v.new_empty(splits, heads, tokens, tokens, dtype=torch.float32)
    v, dout = reachable(v), reachable(split_heads(dout, heads))
    map_gradient_kernel[(heads * splits, rows, columns)](
        dout,
        v,
        parts,
        dout.stride(),
        v.stride(),
        parts.stride(),
        batch,
        heads,
        tokens,
        **tiles(config, v),
    )
    return parts.sum(0).to(v.dtype)


def tiles(config: Config, x: Tensor, keys: int = 0) -> dict[str, Any]:
    """The constants of a launch over x [B, heads, N, r].

    keys: there is room for so many on chip; 0: they come in tiles of BN.
    """
    tokens, rank = x.shape[2:]
    even = tokens % config.BM == 0 and (tokens == keys if keys else tokens % config.BN == 0)
    return {
        "R": rank,
        "BM": config.BM,
        "BN": config.BN,
        "BR": power_of_two(rank),
        "WHOLE": even and rank == power_of_two(rank),
        "PRECISION": precision(x),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def cdiv(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv takes 5 µs, for it works inside of kernels, too


def precision(x: Tensor) -> str:
    """How float32 products are made; without meaning for 16-bit inputs."""
    if x.dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def folded_scale(scale: float, alpha: float, q_pos: Tensor | None, k_pos: Tensor | None) -> float:
    """The logits' factor: a side without position term has its α here, unrounded."""
    return scale * alpha ** ((q_pos is None) + (k_pos is None))


def shares(batch: int, programs: int, config: Config, x: Tensor) -> int:
    """Into how many shares the images go, each with `programs` programs.

    The sums over images have as many parts, so on one device the order of addition never changes.
    """
    return fewest_images(batch, programs, multiprocessors(x) * config.programs)


@functools.cache
def fewest_images(batch: int, programs: int, places: int) -> int:
    """The number of shares with which a place has the fewest images to do, waves times the longest share.

    One program more than there are places runs alone for as long as all others together, so that a few waves
    of short shares can be faster than one of long shares.
    """

    def images(count: int) -> int:
        return -(-count * programs // places) * -(-batch // count)

    return min(range(1, min(batch, 1 + WAVES * places // programs) + 1), key=images)


def multiprocessors(x: Tensor) -> int:
    if x.device.type != "cuda":
        return 4  # Triton's interpreter
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def reachable(x: T) -> T:
    """x; a copy of a view whose heads are spread over 2³¹ elements, for the kernels reach no further."""
    if x is None:
        return None
    tokens, rank = x.shape[-2:]
    reach = (tokens - 1) * x.stride(-2) + (rank - 1) * x.stride(-1)
    return x if reach < 2**31 else x.contiguous()


def strides(x: Tensor | None) -> Strides:
    return NO_STRIDES if x is None else x.stride()


def position_strides(position: Tensor | None) -> Strides:
    return NO_STRIDES if position is None else (0, *position.stride())
