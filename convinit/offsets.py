"""Offsets: drawing one per head, and the token that each token then looks at."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

PADDING_MODES = ("zeros", "replicate", "circular", "reflect")  # the order of PaddingMode in csrc

_OFFSET_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)


def check_int(name: str, value: object, *, minimum: int = 1) -> int:
    """`value` as an int; TypeError or ValueError that names the argument otherwise."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    number = operator.index(value)  # NumPy's integers too
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def check_grid_size(grid_size: Sequence[int]) -> tuple[int, int]:
    """`grid_size` as a pair (H, W) of positive ints; TypeError or ValueError otherwise."""
    if not isinstance(grid_size, Sequence) or isinstance(grid_size, str):
        raise TypeError(f"grid_size must be a pair (H, W) of ints, got {grid_size!r}")
    if len(grid_size) != 2:
        raise ValueError(f"grid_size must be a pair (H, W), got {len(grid_size)} numbers: {grid_size!r}")
    height, width = check_int("grid_size[0]", grid_size[0]), check_int("grid_size[1]", grid_size[1])
    if height * width >= 2**31:
        raise ValueError(f"grid_size must have fewer than 2**31 tokens, got {height} x {width}")
    return height, width


def check_offsets(offsets: Tensor) -> Tensor:
    """`offsets` [B, 2] as int64; TypeError or ValueError otherwise."""
    if not isinstance(offsets, Tensor):
        raise TypeError(f"offsets must be a tensor of shape [B, 2], got {type(offsets).__name__}")
    if offsets.dtype not in _OFFSET_DTYPES:
        raise TypeError(f"offsets must have an integer dtype that fits in int64, got {offsets.dtype}")
    if offsets.dim() != 2 or offsets.shape[1] != 2:
        raise ValueError(f"offsets must have shape [B, 2], one (dy, dx) per head, got {list(offsets.shape)}")
    return offsets if offsets.dtype == torch.int64 else offsets.to(torch.int64)


def check_padding_mode(padding_mode: str) -> int:
    """The index of `padding_mode` in PADDING_MODES; ValueError otherwise."""
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
    return PADDING_MODES.index(padding_mode)


def check_generator(generator: torch.Generator | None) -> None:
    """Refuses generators of other devices: one seed must give the same draw wherever the result goes."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    if generator.device.type != "cpu":
        raise ValueError(
            f"generator must be a CPU generator (draws are made on the CPU, then moved), "
            f"got one on {generator.device}; make it with torch.Generator()"
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
    check_int("num_heads", num_heads)
    check_int("kernel_size", kernel_size)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that the window has a centre, got {kernel_size}")
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
