"""Impulse matrices: the attention maps of heads that look a fixed offset away."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convinit import _library  # noqa: F401  registers torch.ops.convinit
from convinit._checks import PADDING_MODES, check_device, check_grid_size, check_offsets, check_padding_mode
from convinit.offsets import impulse_targets

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool)


def impulse_matrix(
    offsets: Tensor,
    grid_size: Sequence[int],
    *,
    padding_mode: str = "zeros",
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
) -> Tensor:
    """The matrices M with `M[b] @ tokens` = the tokens an offset (dy, dx) away, one matrix per offset.

    M[b, n, m] = 1 if m = impulse_targets(offsets, grid_size, padding_mode=padding_mode)[b, n], else 0.
    So row (i, j) has a single 1 at column (i + dy, j + dx): a convolution whose kernel is an impulse.

    Args:
        offsets: [B, 2], any integer dtype but uint64: (dy, dx) in tokens, of any size.
        grid_size: (H, W); N = H * W tokens, row-major.
        padding_mode: what becomes of rows whose target leaves the grid: "zeros" (all zero, the papers'
            choice), "replicate", "circular" or "reflect", as in `torch.nn.functional.pad`.
        dtype: float64, float32, float16, bfloat16 or bool; `torch.get_default_dtype()` if None.
        device: where the result is made; the device of `offsets` if None.

    Returns:
        M [B, N, N].

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value, or the result would be larger
            than 2**63 - 1 bytes.

    Source: arXiv 2401.12511, which has "zeros" alone.
    """
    offsets = check_offsets(offsets)
    height, width = check_grid_size(grid_size)
    mode = check_padding_mode(padding_mode)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES:
        raise TypeError(f"dtype must be float64, float32, float16, bfloat16 or bool, got {dtype}")
    if offsets.shape[0] * (height * width) ** 2 * dtype.itemsize >= 2**63:
        raise ValueError(
            f"offsets and grid_size ask for a result of shape {[offsets.shape[0], *[height * width] * 2]}, "
            "more than 2**63 - 1 bytes"
        )
    if device is not None:
        offsets = offsets.to(check_device("device", device))
    return torch.ops.convinit.impulse_matrix(offsets, height, width, mode, dtype)


def impulse_matrix_reference(
    offsets: Tensor, grid_size: Sequence[int], *, padding_mode: str = "zeros", dtype: torch.dtype
) -> Tensor:
    """`impulse_matrix` in plain PyTorch, on the device of `offsets`."""
    targets = impulse_targets(offsets, grid_size, padding_mode=padding_mode)[:, :, None]  # [B, N, 1]
    matrix = torch.zeros(*targets.shape[:2], targets.shape[1], dtype=dtype, device=offsets.device)
    return matrix.scatter_(2, targets.clamp(min=0), (targets >= 0).to(dtype))


# Devices without a compiled kernel: one fill and one write per row is what a kernel of ours would do.
@torch.library.register_kernel("convinit::impulse_matrix", None)
def _(offsets: Tensor, height: int, width: int, padding_mode: int, dtype: torch.dtype) -> Tensor:
    return impulse_matrix_reference(
        offsets, (height, width), padding_mode=PADDING_MODES[padding_mode], dtype=dtype
    )


@torch.library.register_fake("convinit::impulse_matrix")
def _(offsets: Tensor, height: int, width: int, padding_mode: int, dtype: torch.dtype) -> Tensor:
    return offsets.new_empty((offsets.shape[0], height * width, height * width), dtype=dtype)
