"""The spatial mixing of a ConvMixer: one filter, or one N×N matrix, for each channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convinit import init as init_
from convinit._checks import (
    check_choice,
    check_flag,
    check_generator,
    check_grid_size,
    check_int,
    check_kernel_size,
    check_number,
    check_same_device,
    check_tensor,
)
from convinit.init.filters import GAIN

__all__ = ["SpatialConv"]

_FILTERS = ("random", "impulse", "box", "gaussian", "softmax")
_MATRICES = ("impulse", "permutation", "full_permutation")


class SpatialConv(nn.Module):
    """Mix every channel over space, by a depthwise filter or by a free N×N matrix.

    filter form:  y[b, c] = filter[a(c)] ∗ x[b, c] + bias[c],   zero padding, stride 1
    matrix form:  y[b, c] = matrix[a(c)] @ x[b, c] + bias[c],   over the N = H·W pixels

    ========================  ========================================================================
    ``method``                initial weights; see :mod:`convinit.init`
    ========================  ========================================================================
    ``"random"``              U(±1/f): the ordinary learned depthwise convolution
    ``"impulse"``             ``gain`` at one random cell; in matrix form gain · impulse matrix
    ``"box"``                 gain / √m at m = ``num_cells`` random cells
    ``"gaussian"``            a Gaussian of ``variance`` around a random cell
    ``"softmax"``             the filter is the softmax of the weights, U(±1/f), in training too
    ``"permutation"``         matrix form: every pixel takes a random pixel
    ``"full_permutation"``    matrix form: a random permutation of the pixels
    ========================  ========================================================================

    Args:
        dim: channels C.
        kernel_size: f, of the filter and of the window from which a matrix's impulse is drawn; the window is
            at most 2·min(H, W) − 1 wide, and odd; filters may be even.
        method: see the table.
        grid_size: (H, W) for the matrix form; None for the filter form.
        num_filters: filters shared by the channels, each channel taking one at random (a(c), the buffer
            ``assignment``): each filter goes to as many channels, or one more. With num_filters = C they are
            permuted. None gives every channel its own.
        num_cells: m of "box".
        variance: of "gaussian", in cells².
        gain: √(Σ w²) of all but "random" and "softmax"; √(1/3) is arXiv 2401.12511's, √(1/f) 2404.01139's.
        trainable: False freezes weight and bias.
        bias: one number a channel, U(±1/f) at first.
        weight: weights of another layer to share. They are then not drawn here but by that layer.
        generator: CPU generator of the initial values.
        device, dtype: of the parameters.

    Shape: [B, C, H, W] → [B, C, H, W].

    Source: the ConvMixer of arXiv 2401.12511. Its bias in matrix form is U(±1/C).
    """

    assignment: Tensor | None

    def __init__(
        self,
        dim: int,
        kernel_size: int = 5,
        *,
        method: str = "random",
        grid_size: Sequence[int] | None = None,
        num_filters: int | None = None,
        num_cells: int = 9,
        variance: float = 1.0,
        gain: float = GAIN,
        trainable: bool = True,
        bias: bool = True,
        weight: nn.Parameter | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim, kernel_size = check_int("dim", dim), check_int("kernel_size", kernel_size)
        if grid_size is not None:
            grid_size = check_grid_size(grid_size)
            if method == "impulse":
                check_kernel_size(kernel_size, grid_size)
        for name, flag in (("trainable", trainable), ("bias", bias)):
            check_flag(name, flag)
        kinds = _FILTERS if grid_size is None else _MATRICES
        form = "filter form (grid_size=None)" if grid_size is None else "matrix form (grid_size given)"
        check_choice(f"method of the {form}", method, kinds)
        num_filters = None if num_filters is None else check_int("num_filters", num_filters)
        if num_filters is not None and num_filters > dim:
            raise ValueError(
                f"num_filters must be at most dim = {dim}, or None for one a channel, got {num_filters}"
            )
        num_cells, variance = check_int("num_cells", num_cells), check_number("variance", variance)
        gain = check_number("gain", gain)
        if method == "box" and num_cells > kernel_size**2:
            raise ValueError(
                f"num_cells must be at most {kernel_size**2}, the cells of a filter, got {num_cells}"
            )
        check_generator(generator)

        self.dim = dim
        self.kernel_size = kernel_size
        self.method = method
        self.grid_size = grid_size
        self.num_filters = dim if num_filters is None else num_filters
        self.num_cells = num_cells
        self.variance = variance
        self.gain = gain

        shape: tuple[int, ...]
        if self.grid_size is None:
            shape = (self.num_filters, 1, kernel_size, kernel_size)
        else:
            tokens = self.grid_size[0] * self.grid_size[1]
            shape = (self.num_filters, tokens, tokens)
        self.owns_weight = weight is None
        if weight is None:
            weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=trainable)
        elif check_tensor("weight", weight, str(list(shape))).shape != shape:
            raise ValueError(f"weight must be {list(shape)}, got {list(weight.shape)}")
        self.weight = weight
        self.bias = (
            nn.Parameter(torch.empty(dim, device=device, dtype=dtype), requires_grad=trainable)
            if bias
            else None
        )
        assignment = None if num_filters is None else torch.empty(dim, dtype=torch.int64, device=device)
        self.register_buffer("assignment", assignment)
        if not self.weight.is_meta:
            self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw weight (if it is this layer's own), assignment and bias."""
        if self.owns_weight:
            self._draw_weight(generator)
        if self.assignment is not None:
            order = torch.randperm(self.dim, generator=generator, device="cpu")
            self.assignment.copy_(order % self.num_filters)
        if self.bias is not None:
            fan_in = torch.empty(1, 1, self.kernel_size, self.kernel_size, device="meta")
            init_.default_(fan_in, self.bias, generator=generator)

    def _draw_weight(self, generator: torch.Generator | None) -> None:
        if self.method == "permutation":
            init_.permutation_mixing_(self.weight, gain=self.gain, generator=generator)
        elif self.method == "full_permutation":
            init_.full_permutation_mixing_(self.weight, gain=self.gain, generator=generator)
        elif self.grid_size is not None:
            init_.impulse_mixing_(
                self.weight, self.grid_size, self.kernel_size, gain=self.gain, generator=generator
            )
        elif self.method == "impulse":
            init_.impulse_filter_(self.weight, gain=self.gain, generator=generator)
        elif self.method == "box":
            init_.box_filter_(self.weight, self.num_cells, gain=self.gain, generator=generator)
        elif self.method == "gaussian":
            init_.gaussian_filter_(self.weight, self.variance, gain=self.gain, generator=generator)
        else:  # "random", and "softmax", whose weights are the numbers under the softmax
            init_.random_filter_(self.weight, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, torch.fx.Proxy):
            check_tensor("x", x, f"[B, {self.dim}, H, W]")
            check_same_device("x", x, weight=self.weight)
        weight: Tensor = self.weight
        if self.method == "softmax":
            weight = weight.flatten(1).softmax(dim=1).view_as(weight)
        if self.assignment is not None:
            weight = weight[self.assignment]
        if self.grid_size is None:
            return F.conv2d(x, weight, self.bias, padding="same", groups=self.dim)
        if x.shape[1:] != (self.dim, *self.grid_size):
            raise ValueError(
                f"x must be [B, {self.dim}, {self.grid_size[0]}, {self.grid_size[1]}], the grid_size of the "
                f"mixing matrices, got {list(x.shape)}"
            )
        out = torch.bmm(x.flatten(2).transpose(0, 1), weight.mT)  # [C, B, N]
        if self.bias is not None:
            out = out + self.bias.view(-1, 1, 1)
        return out.transpose(0, 1).reshape(x.shape)

    def extra_repr(self) -> str:
        form = f"kernel_size={self.kernel_size}" if self.grid_size is None else f"grid_size={self.grid_size}"
        return (
            f"{self.dim}, {form}, method={self.method!r}, num_filters={self.num_filters}, "
            f"bias={self.bias is not None}, trainable={self.weight.requires_grad}"
        )
