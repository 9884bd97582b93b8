"""Fixed position embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convinit._checks import came, check_choice, check_grid_size, check_int, check_number

__all__ = ["sincos_2d"]


def sincos_2d(
    grid_size: Sequence[int],
    dim: int,
    temperature: float = 10000.0,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """2-D sine-cosine position embedding of a token grid.

    Token (i, j): (sin j·ω, cos j·ω, sin i·ω, cos i·ω),   ω_k = temperature^(−k / (D/4 − 1)), k = 0 … D/4 − 1

    Args:
        grid_size: (H, W); tokens are row-major, x = j runs along the row.
        dim: D, a multiple of 4. With D = 4 the only frequency is 1.
        temperature: ratio of the highest to the lowest frequency.
        dtype, device: of the result; computed in float64 on the CPU whatever they are.

    Returns:
        [H·W, D].

    Raises:
        TypeError, ValueError: grid_size is not a pair of positive ints, or dim not a positive multiple of 4.

    Source: the SimpleViT of arXiv 2205.01580, the embedding of arXiv 2401.12511.
    """
    height, width = check_grid_size(grid_size)
    dim = check_int("dim", dim)
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4 for a 2-D sin-cos embedding, got {dim}")
    temperature = check_number("temperature", temperature)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {came(dtype)}")

    def arange(n: int) -> Tensor:
        return torch.arange(n, dtype=torch.float64, device="cpu")

    omega = temperature ** (-arange(dim // 4) / max(dim // 4 - 1, 1))
    x = (arange(width).unsqueeze(1) * omega).expand(height, width, -1)
    y = (arange(height).unsqueeze(1) * omega).unsqueeze(1).expand(height, width, -1)
    embedding = torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), dim=-1).flatten(0, 1)
    return embedding.to(dtype=dtype, device=device or torch.get_default_device())


FIXED = ("sincos", "identity")


def check_position(kind: str, grid_size: tuple[int, int], dim: int) -> None:
    """Refuses a fixed P [N, D] that there is not: D is not a multiple of 4, or, for "identity", below N."""
    if check_choice("pos_embed", kind, FIXED) == "sincos":
        sincos_2d((1, 1), dim)
    elif grid_size[0] * grid_size[1] > dim:
        tokens = grid_size[0] * grid_size[1]
        raise ValueError(f"dim must be at least N = {tokens} for pos_embed='identity', got {dim}")


@torch.no_grad()
def fill_position_(module: nn.Module, kind: str, grid_size: tuple[int, int], dim: int) -> None:
    """Gives a module's buffer ``pos_embed``, which its state_dict leaves out, its values.

    They are `sincos_2d`, or of kind "identity" a unit vector a token.

    In place where it can be. ``load_state_dict(assign=True)`` gives weights another device or dtype, and
    leaves the buffer as it was, on the meta device for one: then a new one like the weights takes its place.
    """
    old = module.pos_embed
    assert isinstance(old, Tensor)
    like = next((each for each in module.parameters() if each.is_floating_point()), old)
    identity = kind == "identity"
    P = torch.eye(len(old), dim, device="cpu") if identity else sincos_2d(grid_size, dim, device="cpu")
    if (old.device, old.dtype) == (like.device, like.dtype):
        old.copy_(P)
    else:
        module.pos_embed = P.to(like.device, like.dtype)
