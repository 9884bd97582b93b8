"""Impulses in the token-mixing layers of MLP-Mixer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convinit._checks import check_grid_size, check_number, check_offsets, check_tensor
from convinit.init._shared import rounded
from convinit.ops.impulse_matrix import impulse_matrix

_GELU_MEAN = 0.187  # E[GELU(x)]² / E[GELU(x)²] of x ~ N(0, 1)


@torch.no_grad()
def impulse_token_mixing_(
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    offsets: Tensor,
    grid_size: Sequence[int],
    *,
    gain: float | None = None,
    padding_mode: str = "zeros",
) -> tuple[Tensor, Tensor]:
    """Set a token-mixing MLP, fc2(GELU(fc1(x))) over the tokens, to a sum of impulse convolutions.

    out[n] = gain · Σ_g GELU(x[n + offsets[g]])

    Hidden unit u belongs to token u mod N and to offset u // N: its row of fc1 is an impulse at its token's
    target, and fc2 writes it back to its token. With T hidden units there are G = T // N offsets. The T mod N
    units left over keep their incoming weights and bias, and their outgoing weights are zero: they add
    nothing yet, and can still learn. All other biases are zero.

    Args:
        fc1_weight: [T, N] with T ≥ N, fc1_bias: [T] or None; of the first ``nn.Linear``, written in place.
        fc2_weight: [N, T], fc2_bias: [N] or None; of the second, written in place.
        offsets: [G, 2], any integer dtype: (dy, dx) in tokens; G = T // N.
        grid_size: (H, W) with H·W = N.
        gain: the outgoing weight. Default (G + 0.187 G (G − 1))^−½: for independent inputs x ~ N(0, 1) the
            second moment of the output, gain² (G E[GELU(x)²] + G (G − 1) E[GELU(x)]²), is then E[GELU(x)²],
            that of fan-in-scaled (LeCun) weights.
        padding_mode: see :func:`convinit.impulse_matrix`.

    Returns:
        (fc1_weight, fc2_weight).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value, or T < N: there is no unit for
            every token.

    Source: arXiv 2505.19985 reports impulses for MLP-Mixer; its code is not published; the layout is ours.
    """
    height, width = check_grid_size(grid_size)
    groups = _check_weights(fc1_weight, fc1_bias, fc2_weight, fc2_bias, height * width)
    offsets = check_offsets(offsets, values=True)
    if len(offsets) != groups:
        raise ValueError(
            f"offsets must be [{groups}, 2], one for each full group of N = {height * width} hidden units, "
            f"got {list(offsets.shape)}"
        )
    if gain is None:
        gain = (groups + _GELU_MEAN * groups * (groups - 1)) ** -0.5
    gain, tokens = check_number("gain", gain), height * width
    matrix = impulse_matrix(
        offsets.cpu(), (height, width), padding_mode=padding_mode, dtype=torch.float32, device="cpu"
    )
    rounded("fc2_weight", fc2_weight, torch.tensor(gain, dtype=torch.float64, device="cpu"))
    fc1_weight[: groups * tokens] = matrix.flatten(0, 1).to(fc1_weight)
    fc2_weight.zero_()
    unit = torch.arange(groups * tokens, device=fc2_weight.device)
    fc2_weight[unit % tokens, unit] = gain
    if fc1_bias is not None:
        fc1_bias[: groups * tokens] = 0
    if fc2_bias is not None:
        fc2_bias.zero_()
    return fc1_weight, fc2_weight


def _check_weights(
    fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None, tokens: int
) -> int:
    """G, the number of full groups of hidden units."""
    check_tensor("fc1_weight", fc1_weight, f"[T, {tokens}]", dims=2)
    check_tensor("fc2_weight", fc2_weight, f"[{tokens}, T]", dims=2)
    if fc1_weight.shape[1] != tokens or fc2_weight.shape != fc1_weight.shape[::-1]:
        raise ValueError(
            f"fc1_weight and fc2_weight must be [T, {tokens}] and [{tokens}, T] for the {tokens} tokens of "
            f"the grid, got {list(fc1_weight.shape)} and {list(fc2_weight.shape)}"
        )
    hidden = fc1_weight.shape[0]
    for name, bias, size in (("fc1_bias", fc1_bias, hidden), ("fc2_bias", fc2_bias, tokens)):
        if bias is not None and check_tensor(name, bias, f"[{size}] or None").shape != (size,):
            raise ValueError(f"{name} must be [{size}] or None, got {list(bias.shape)}")
    if hidden < tokens:
        raise ValueError(
            f"fc1_weight must have a hidden unit for each of N = {tokens} tokens, got T = {hidden}: fewer "
            "cannot carry a convolution of the grid; widen the token-mixing MLP"
        )
    return hidden // tokens
