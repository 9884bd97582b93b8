"""Offsets: drawing one per head, and the token that each token then looks at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convinit._checks import (
    check_flag,
    check_generator,
    check_grid_size,
    check_int,
    check_kernel_size,
    check_offsets,
    check_padding_mode,
)


def sample_offsets(
    num_heads: int, kernel_size: int, *, stratified: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Draws one random offset per head, uniformly, from a square window.

    Equivalent to `torch.randint(-(kernel_size // 2), kernel_size // 2 + 1, (num_heads, 2))`.

    Args:
        num_heads: number of offsets.
        kernel_size: side f of the window in tokens, odd; dy and dx lie in [-(f // 2), f // 2].
        stratified: instead of independent draws, the f² offsets in random order, over and over: every f²
            heads in a row have each offset once. So a few heads a layer cover the window over the layers.
        generator: a CPU generator; torch's default one if None.

    Returns:
        offsets [num_heads, 2], int64, on the CPU: (dy, dx) of each head.

    Raises:
        TypeError, ValueError: an argument is not a positive int, kernel_size is even, or generator is not a
            CPU generator.

    Source: arXiv 2401.12511: each head is given a random impulse filter of an f x f kernel.
    Stratified draws are ours.
    """
    num_heads = check_int("num_heads", num_heads, maximum=2**31 - 1)
    kernel_size = check_kernel_size(kernel_size)
    check_flag("stratified", stratified)
    check_generator(generator)
    reach = kernel_size // 2
    if stratified:
        window = kernel_size**2
        rounds = torch.rand(-(-num_heads // window), window, generator=generator, device="cpu").argsort(dim=1)
        cells = rounds.flatten()[:num_heads]
        return torch.stack([cells // kernel_size, cells % kernel_size], dim=1) - reach
    return torch.randint(-reach, reach + 1, (num_heads, 2), generator=generator, device="cpu")


def impulse_targets(offsets: Tensor, grid_size: Sequence[int], *, padding_mode: str = "zeros") -> Tensor:
    """The token that each token looks at: the column of the 1 in each row of the impulse matrix.

    Token (i, j) = i * W + j looks at (i + dy, j + dx). A target outside the grid follows `padding_mode`, with
    the meaning of `torch.nn.functional.pad`, for offsets of any size:
    "zeros": none, -1; "replicate": the nearest token of the edge; "circular": the grid repeats;
    "reflect": the grid is mirrored at its edges, back and forth, without repeating them.

    Args:
        offsets: [B, 2], any integer dtype but uint64: (dy, dx) in tokens.
        grid_size: (H, W); N = H * W tokens, row-major.
        padding_mode: "zeros" (the papers' choice), "replicate", "circular" or "reflect".

    Returns:
        targets [B, N], int64, on the device of `offsets`; -1 where the row is all zero.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.

    Source: arXiv 2401.12511, which has "zeros" alone.
    """
    offsets = check_offsets(offsets)
    height, width = check_grid_size(grid_size)
    check_padding_mode(padding_mode)
    y = _axis_targets(offsets[:, 0], height, padding_mode)[:, :, None]  # [B, H, 1]
    x = _axis_targets(offsets[:, 1], width, padding_mode)[:, None, :]  # [B, 1, W]
    return torch.where((y < 0) | (x < 0), -1, y * width + x).flatten(1)


def _axis_targets(offset: Tensor, size: int, padding_mode: str) -> Tensor:
    """The targets [B, size] along one axis; offsets [B] are reduced first, so that none overflows."""
    position = torch.arange(size, device=offset.device)
    offset = offset[:, None]
    if padding_mode == "circular":
        return (position + offset % size) % size
    if padding_mode == "reflect":
        period = max(2 * (size - 1), 1)  # 0 1 2 3 2 1 | 0 1 ...; an axis of one has nowhere to go
        phase = (position + offset % period) % period
        return torch.minimum(phase, period - phase)
    target = position + offset.clamp(-size, size)
    inside = target.clamp(0, size - 1)
    return inside if padding_mode == "replicate" else torch.where(inside == target, target, -1)


def attention_on_targets(maps: Tensor, offsets: Tensor, grid_size: Sequence[int]) -> float:
    """Mean attention on the targets of offsets, over the rows whose target is inside the grid.

    Args:
        maps: [heads, N, N].
        offsets: [heads, 2].
        grid_size: (H, W).
    """
    targets = impulse_targets(offsets, grid_size)  # [heads, N]
    picked = maps.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    return picked[targets >= 0].mean().item()
