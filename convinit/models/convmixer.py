"""ConvMixer with the spatial filters of arXiv 2401.12511."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convinit._checks import check_flag, check_int, check_tensor
from convinit.init import default_
from convinit.init.filters import GAIN
from convinit.models.pretrained import Pretrained
from convinit.models.simple_vit import pair, patch_grid
from convinit.nn.spatial_conv import SpatialConv

__all__ = ["ConvMixer"]


class ConvMixer(Pretrained, nn.Module):
    """Patches, then blocks of spatial and pointwise mixing, mean over the pixels, linear head.

    block:  x = x + BatchNorm(GELU(spatial(x)));   x = BatchNorm(GELU(pointwise(x)))

    The first GELU is that of ConvMixer and of timm; the published code of arXiv 2401.12511 has none where it
    mixes by filters: ``spatial_gelu=False``.

    ``method="random"`` with ``trainable_mixing=True`` is the ordinary, learned ConvMixer.

    Args:
        image_size, patch_size: pixels, one number or (height, width).
        num_classes: outputs.
        dim: channels.
        depth: blocks.
        kernel_size: f of the depthwise filters, and of the window of a matrix's impulse.
        channels: of the images.
        method, num_cells, variance, gain: kind of the spatial filters; see :class:`convinit.nn.SpatialConv`.
        matrix_form: mix by N×N matrices: "impulse", "permutation" or "full_permutation".
        num_filters: filters of a layer, which its channels share; None means one a channel.
        share_layers: one set of filters for all layers; each layer still deals them to its channels in an
            order of its own, and has its own bias.
        spatial_gelu, spatial_bias: False leaves out the GELU after, or the bias of, the spatial mixing.
        trainable_mixing: False freezes filters and their bias. On a CPU frozen impulse filters are then
            copies, no convolutions; see :class:`convinit.nn.SpatialConv`.
        generator: CPU generator of the initial values; None means torch's own.
        device, dtype: of parameters and buffers.

    Shape: [B, channels, height, width] → [B, num_classes].

    Raises:
        ValueError: the image is not divisible into patches, or the filter options do not fit together.

    Source: arXiv 2201.09792 (ConvMixer); arXiv 2401.12511.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        num_classes: int,
        *,
        dim: int = 512,
        depth: int = 6,
        kernel_size: int = 5,
        channels: int = 3,
        method: str = "random",
        num_cells: int = 9,
        variance: float = 1.0,
        gain: float = GAIN,
        matrix_form: bool = False,
        num_filters: int | None = None,
        share_layers: bool = False,
        spatial_gelu: bool = True,
        spatial_bias: bool = True,
        trainable_mixing: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_classes, depth = check_int("num_classes", num_classes), check_int("depth", depth, minimum=0)
        dim, channels = check_int("dim", dim), check_int("channels", channels)
        flags = {
            "matrix_form": matrix_form,
            "share_layers": share_layers,
            "spatial_gelu": spatial_gelu,
            "spatial_bias": spatial_bias,
            "trainable_mixing": trainable_mixing,
        }
        for name, flag in flags.items():
            check_flag(name, flag)
        self.grid_size = patch_grid(image_size, patch_size)
        self.image_size = pair("image_size", image_size)
        self.channels = channels
        self.share_layers = share_layers

        # Made on the meta device, so that nothing is drawn twice.
        factory: dict[str, Any] = {"device": "meta", "dtype": dtype}
        patch = pair("patch_size", patch_size)
        self.patch_embed = nn.Sequential(
            nn.Conv2d(channels, dim, patch, stride=patch, **factory),
            nn.GELU(),
            nn.BatchNorm2d(dim, **factory),
        )
        self.blocks: list[Block] = nn.ModuleList()  # type: ignore[assignment]
        for layer in range(depth):
            spatial = SpatialConv(
                dim,
                kernel_size,
                method=method,
                grid_size=self.grid_size if matrix_form else None,
                num_filters=dim if share_layers and num_filters is None else num_filters,
                num_cells=num_cells,
                variance=variance,
                gain=gain,
                bias=spatial_bias,
                trainable=trainable_mixing,
                weight=self.blocks[0].spatial.weight if share_layers and layer > 0 else None,
                **factory,
            )
            self.blocks.append(Block(spatial, spatial_gelu, **factory))
        self.head = nn.Linear(dim, num_classes, **factory)
        self.register_load_state_dict_post_hook(_tie_layers)

        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type != "meta":
            self.to_empty(device=device)
            self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, as the constructor does. Works after ``to_empty``.

        Args:
            generator: CPU generator. The same seed gives the same model.
        """
        self._tie_layers()
        for module in self.modules():
            if isinstance(module, SpatialConv):
                module.reset_parameters(generator)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Conv2d):
                default_(module.weight, module.bias, generator=generator)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._tie_layers()  # before the blocks load: each then fills the one weight
        super()._load_from_state_dict(*args)

    def _tie_layers(self) -> None:
        """``to_empty`` and ``load_state_dict(assign=True)`` untie parameters."""
        if self.share_layers:
            for block in self.blocks:
                block.spatial.weight = self.blocks[0].spatial.weight

    def forward(self, images: Tensor) -> Tensor:
        sizes = (self.channels, *self.image_size)
        expected = "[B, {}, {}, {}]".format(*sizes)
        if check_tensor("images", images, expected, dims=4).shape[1:] != sizes:
            raise ValueError(f"images must be {expected}, got {list(images.shape)}")
        x = self.patch_embed(images)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


def _tie_layers(model: ConvMixer, _: Any) -> None:
    model._tie_layers()


class Block(nn.Module):
    """Residual spatial mixing, then pointwise mixing."""

    def __init__(
        self,
        spatial: SpatialConv,
        gelu: bool,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        dim = spatial.dim
        self.spatial = spatial
        self.spatial_norm = nn.Sequential(
            nn.GELU() if gelu else nn.Identity(), nn.BatchNorm2d(dim, **factory)
        )
        self.pointwise = nn.Sequential(
            nn.Conv2d(dim, dim, 1, **factory), nn.GELU(), nn.BatchNorm2d(dim, **factory)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.spatial_norm(self.spatial(x))
        return self.pointwise(x)
