"""SimpleViT and the Models I, II and III of arXiv 2401.12511."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convinit._checks import (
    check_choice,
    check_flag,
    check_int,
    check_offsets,
    check_pair,
    check_share,
    check_tensor,
)
from convinit.fit.api import Solver
from convinit.init import default_
from convinit.init.subspace import outside, row_space
from convinit.models.pretrained import Pretrained
from convinit.nn._linear import Linear
from convinit.nn.attention import VARIANTS, ConvInitAttention, reset_mixing_
from convinit.nn.position import fill_position_

__all__ = ["SimpleViT"]


class SimpleViT(Pretrained, nn.Module):
    """Vision Transformer without class token: patches, pre-norm blocks, mean over the tokens, linear head.

    ===========  ===================================================  =============
    ``variant``  queries and keys of a layer see                      values see
    ===========  ===================================================  =============
    "vanilla"    LN(x), with α·x + (1−α)·P once, at the entry         LN(x)
    "I"          α·LN(x) + (1−α)·P                                    LN(x)
    "II"         P                                                    LN(x)
    "III"        nothing: Q [heads, N, r] and K [heads, r, N] free    LN(x)
    ===========  ===================================================  =============

    P is fixed: the sin-cos embedding of the patch grid, or the identity. ``method="impulse"`` is
    fitted, all layers and heads in one call of :func:`convinit.fit_qk`; "scrambled" and "norm_matched" are
    its controls; "random" and "mimetic" are the papers' baselines; "default" leaves queries and keys as
    ``nn.Linear`` makes them. Where the vanilla variant's maps are fitted by "newton" to the sin-cos P,
    nothing that is added to its tokens lies in the row space V of P at the start: W ← (I − V Vᵀ) W. Content
    still makes the maps softer; :func:`convinit.init_vit_` of the model sets how sharp each layer is.

    Args:
        image_size, patch_size: pixels, one number or (height, width).
        num_classes: outputs.
        dim: D, width of the tokens, divisible by 4.
        depth: blocks.
        num_heads, head_dim: heads and their width r; head_dim=None means dim / num_heads.
        mlp_dim: hidden width of the MLP.
        channels: of the images.
        variant, alpha: see the table.
        method, distribution, values, kernel_size, scale: see :class:`~convinit.ConvInitAttention`.
        padding_mode, fit, weight_norm, peak, value, proj, trainable_mixing: the same.
        pos_embed: P, "sincos" or "identity", a unit vector a token, which needs N ≤ D.
        input_pos_embed: mix α·x + (1−α)·P at the entry in Models II and III too, as the vanilla variant
            always does. Not for Model I, whose layers see P.
        layers_alike: every layer starts from the queries and keys of the first, as in arXiv 2404.01139.
        attn_drop, proj_drop: dropout on attention weights, and on the outputs of attention and MLP.
        offsets: [depth·heads, 2], or [heads, 2] for all layers alike, (dy, dx) of heads. None deals them out
            so that every f² heads in a row cover the window once (stratified over the layers); "random" and
            "fixed" as in ConvInitAttention.
        generator: CPU generator of the initial values; None means torch's own.
        device, dtype: of parameters and buffers.

    Shape: [B, channels, height, width] → [B, num_classes].

    Raises:
        ValueError: the image is not divisible into patches, dim not by 4 or not by num_heads.

    Source: arXiv 2205.01580 (SimpleViT); arXiv 2401.12511. As there, no projection of the
    attention has a bias. A departure: the subspace of P (docs/init_vit).
    """

    pos_embed: Tensor

    def __init__(
        self,
        image_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        num_classes: int,
        *,
        dim: int = 512,
        depth: int = 6,
        num_heads: int = 8,
        head_dim: int | None = 64,
        mlp_dim: int = 512,
        channels: int = 3,
        variant: str = "I",
        alpha: float = 0.2,
        method: str = "impulse",
        distribution: str = "normal",
        values: str = "mimetic",
        kernel_size: int | None = None,
        scale: float | None = None,
        padding_mode: str = "zeros",
        fit: str | Solver = "newton",
        weight_norm: float | None = None,
        peak: float | None = None,
        offsets: Tensor | str | None = None,
        pos_embed: str = "sincos",
        input_pos_embed: bool = False,
        layers_alike: bool = False,
        value: bool = True,
        proj: bool = True,
        trainable_mixing: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_classes, depth = check_int("num_classes", num_classes), check_int("depth", depth, minimum=0)
        dim, num_heads = check_int("dim", dim), check_int("num_heads", num_heads)
        mlp_dim, channels = check_int("mlp_dim", mlp_dim), check_int("channels", channels)
        check_choice("variant", variant, VARIANTS)
        self.dim = dim
        self.channels = channels
        self.patch_size = pair("patch_size", patch_size)
        self.grid_size = patch_grid(image_size, patch_size)
        self.image_size = pair("image_size", image_size)
        check_flag("layers_alike", layers_alike)
        if check_flag("input_pos_embed", input_pos_embed) and variant == "I":
            raise ValueError("input_pos_embed must be False for variant 'I', whose layers see P themselves")
        if layers_alike and isinstance(offsets, Tensor) and len(offsets) != num_heads:
            raise ValueError(
                f"offsets must be [{num_heads}, 2] with layers_alike, of one layer, got {list(offsets.shape)}"
            )
        self.layers_alike = layers_alike
        self.fixed_position = pos_embed
        mixed = variant == "vanilla" or input_pos_embed
        self.entry_alpha = check_share("alpha", alpha) if mixed else None

        # Made on the meta device, so that nothing is drawn twice.
        factory: dict[str, Any] = {"device": "meta", "dtype": dtype}
        patch_dim = channels * self.patch_size[0] * self.patch_size[1]
        self.patch_embed = nn.Sequential(
            nn.LayerNorm(patch_dim, **factory) if patch_dim > 1 else nn.Identity(),  # of one number it is 0
            Linear(patch_dim, dim, **factory),
            nn.LayerNorm(dim, **factory),
        )
        self.blocks: list[Block] = nn.ModuleList()  # type: ignore[assignment]
        if isinstance(offsets, Tensor) and check_offsets(offsets).shape not in (
            (num_heads, 2),
            (depth * num_heads, 2),
        ):
            raise ValueError(
                f"offsets must be [{num_heads}, 2] for all layers alike or [{depth * num_heads}, 2], got "
                f"{list(offsets.shape)}"
            )
        for layer in range(depth):
            own = offsets
            if isinstance(offsets, Tensor) and len(offsets) != num_heads:
                own = offsets[layer * num_heads : (layer + 1) * num_heads]
            attn = ConvInitAttention(
                dim,
                num_heads,
                self.grid_size,
                head_dim=head_dim,
                kernel_size=kernel_size,
                alpha=alpha,
                variant=variant,
                scale=scale,
                attn_drop=attn_drop,
                proj_drop=proj_drop,
                value=value,
                proj=proj,
                proj_bias=False,
                trainable_mixing=trainable_mixing,
                padding_mode=padding_mode,
                method=method,
                distribution=distribution,
                values=values,
                fit=fit,
                weight_norm=weight_norm,
                peak=peak,
                pos_embed=pos_embed,
                offsets=own,
                **factory,
            )
            self.blocks.append(Block(attn, mlp_dim, proj_drop, **factory))
        self.norm = nn.LayerNorm(dim, **factory)
        self.head = Linear(dim, num_classes, **factory)
        P = torch.empty(self.grid_size[0] * self.grid_size[1], dim, **factory)
        self.register_buffer("pos_embed", P, persistent=False)
        self.register_load_state_dict_post_hook(_fill_position)

        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type != "meta":
            self.to_empty(device=device)
            self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, as the constructor does. Works after ``to_empty``.

        Args:
            generator: CPU generator. The same seed gives the same model.
        """
        _fill_position(self, None)
        layers = [block.attn for block in self.blocks]
        reset_mixing_(layers, generator, alike=self.layers_alike)  # one fit for all layers
        for layer in layers:
            layer.reset_values(generator)
        others = [self.patch_embed, self.norm, self.head]
        others += [child for block in self.blocks for child in (block.norm, block.mlp)]
        for module in (module for part in others for module in part.modules()):
            if isinstance(module, nn.Linear):
                default_(module.weight, module.bias, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        if layers and layers[0].init_options.undisturbed:
            self._separate_position_()

    def _separate_position_(self) -> None:
        """Keeps all that is added to the tokens out of the row space V of P: see `convinit.init.subspace`."""
        writers = self.writers()
        if not writers:
            return
        V = row_space(self.pos_embed.cpu(), self.pos_embed.dtype)
        for tensor in (tensor for layer in writers for tensor in (layer.weight, layer.bias)):
            new = None if tensor is None else outside(tensor.cpu(), V, tensor.dtype)
            if new is not None:
                tensor.copy_(new)

    def get_extra_state(self) -> Tensor:
        """What the state_dict keeps beside weights: alpha at the entry, [1] float64, or [0] without one."""
        alpha = [] if self.entry_alpha is None else [self.entry_alpha]
        return torch.tensor(alpha, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.entry_alpha = next(iter(state.tolist()), None)

    def writers(self) -> list[nn.Linear]:
        """Every layer whose output is added to the tokens, of models whose tokens hold the sin-cos P.

        They are those of the vanilla variant. Empty where something else than a layer writes to the tokens.
        """
        attentions = [block.attn for block in self.blocks]
        if self.fixed_position != "sincos" or any(attn.variant != "vanilla" for attn in attentions):
            return []
        outputs = [attn.proj if isinstance(attn.proj, nn.Linear) else attn.v for attn in attentions]
        layers = [self.patch_embed[1], *outputs, *(block.mlp[3] for block in self.blocks)]
        known = [layer for layer in layers if isinstance(layer, nn.Linear)]
        return known if len(known) == len(layers) else []

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, channels, height, width] → tokens [B, N, D], as they enter the first block."""
        x = self.patch_embed(self.patchify(images))
        if self.entry_alpha is None:
            return x
        return self.entry_alpha * x + (1 - self.entry_alpha) * self.pos_embed

    def patchify(self, images: Tensor) -> Tensor:
        """[B, channels, height, width] → [B, N, patch height · patch width · channels]."""
        (height, width), (rows, columns) = self.grid_size, self.patch_size
        sizes = (self.channels, height * rows, width * columns)
        expected = "[B, {}, {}, {}]".format(*sizes)
        if check_tensor("images", images, expected, dims=4).shape[1:] != sizes:
            raise ValueError(f"images must be {expected}, got {list(images.shape)}")
        patches = images.unflatten(3, (width, columns)).unflatten(
            2, (height, rows)
        )  # [B, C, H, rows, W, columns]
        return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))

    def attention_maps(self, images: Tensor) -> Tensor:
        """The attention maps of every layer, [depth, B, heads, N, N]."""
        maps = []
        x = self.embed(images)
        for block in self.blocks:
            maps.append(block.attn.attention_map(block.norm(x)).expand(len(images), -1, -1, -1))
            x = block(x)
        return torch.stack(maps)


def _fill_position(model: SimpleViT, _: Any) -> None:
    fill_position_(model, model.fixed_position, model.grid_size, model.dim)


class Block(nn.Module):
    """Pre-norm block: x + attention(LN(x)), then x + MLP(x), whose first layer is a LayerNorm."""

    def __init__(
        self,
        attn: ConvInitAttention,
        mlp_dim: int,
        drop: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(attn.dim, **factory)
        self.attn = attn
        self.mlp = nn.Sequential(
            nn.LayerNorm(attn.dim, **factory),
            Linear(attn.dim, mlp_dim, **factory),
            nn.GELU(),
            Linear(mlp_dim, attn.dim, **factory),
            nn.Dropout(drop),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """One number, or (height, width), as (height, width)."""
    if hasattr(value, "__index__"):
        value = (check_int(name, value),) * 2
    return check_pair(name, value, "an int or a pair (height, width)")


def patch_grid(image_size: int | Sequence[int], patch_size: int | Sequence[int]) -> tuple[int, int]:
    """The token grid (H, W) of an image cut into patches."""
    image, patch = pair("image_size", image_size), pair("patch_size", patch_size)
    if image[0] % patch[0] or image[1] % patch[1]:
        raise ValueError(
            f"image_size must be divisible by patch_size, got {image[0]} x {image[1]} pixels and "
            f"{patch[0]} x {patch[1]} patches"
        )
    return image[0] // patch[0], image[1] // patch[1]
