"""Finds the models that the adapters know inside any module."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from convinit.adapters import (
    convinit_vit,
    mixer,
    rotary,
    swin,
    timm_vit,
    torch_nn,
    torchvision,
    transformers_towers,
    transformers_vit,
    vit_pytorch,
)
from convinit.adapters.additive import AdditiveLayout
from convinit.adapters.by_hand import by_hand
from convinit.adapters.layout import UNKNOWN_GRID, Layout, SelfAttention

Adapter = Callable[[nn.Module, str], Layout | None]

# Whole models; the first that knows a module has it, and what is inside is not looked at again.
MODELS: tuple[Adapter, ...] = (
    convinit_vit.adapt,
    timm_vit.adapt,
    torchvision.adapt,
    transformers_vit.adapt,
    transformers_towers.adapt,
    vit_pytorch.adapt,
    rotary.adapt,
    swin.adapt,
    mixer.adapt,
)
# Single attentions, for models that nobody knows: grid and P come from the caller.
ATTENTIONS: tuple[Callable[[nn.Module, str], SelfAttention | None], ...] = (
    timm_vit.attention,
    transformers_vit.attention,
    vit_pytorch.attention,
    torch_nn.attention,
)


def unwrapped(model: Any) -> nn.Module:
    """The model inside torch.compile's, DataParallel's and DDP's wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod
        else:
            return model


def find_layouts(
    model: nn.Module,
    *,
    grid_size: tuple[int, int] | None,
    pos_embed: Tensor | None,
    adapter: Adapter | None,
    images: Any = None,
) -> list[Layout]:
    """The layouts of all known models in `model`, in the order of its modules; by hand if P is given."""
    if pos_embed is not None:
        if grid_size is None:
            raise ValueError("grid_size must be given together with pos_embed")
        return [_by_hand(model, grid_size, pos_embed)]
    adapters = MODELS if adapter is None else (adapter, *MODELS)
    found: list[Layout] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        for adapt in adapters:
            layout = adapt(module, name)
            if layout is not None:
                found.append(layout)
                inside |= set(map(id, module.modules()))
                break
    if not found:
        raise ValueError(_unknown(model))
    for layout in found:
        _set_grid(layout, grid_size, images)
    return found


def _set_grid(layout: Layout, grid_size: tuple[int, int] | None, images: Any) -> None:
    """The caller's grid in place of the one that the model tells or that was guessed."""
    tokens = len(layout.position.read()) if isinstance(layout, AdditiveLayout) and layout.position else None
    if grid_size is None:
        patch = getattr(layout, "patch_of_guessed_grid", None)
        shown = patch and isinstance(images, Tensor) and images.dim() == 4
        if patch and shown:
            layout.grid_size = (images.shape[2] // patch[0], images.shape[3] // patch[1])
            return
        if layout.grid_size == UNKNOWN_GRID:
            raise ValueError(
                f"grid_size must be given: {type(layout.root).__name__} does not keep the grid of its "
                f"{tokens} tokens, and they make no square; init_vit_(model, grid_size=(H, W))"
            )
        if patch:
            height, width = layout.grid_size
            warnings.warn(
                f"grid_size was not given, and {type(layout.root).__name__} does not keep the grid of its "
                f"{tokens} tokens: taken for {height} x {width}. images= or grid_size= says what is right",
                stacklevel=5,
            )
        return
    if tokens is None or grid_size[0] * grid_size[1] != tokens:
        raise ValueError(
            f"grid_size must be None for {type(layout.root).__name__}"
            if tokens is None
            else f"grid_size must have H·W = {tokens} tokens, got {grid_size[0]} x {grid_size[1]}"
        )
    layout.grid_size = grid_size


def _by_hand(model: nn.Module, grid_size: tuple[int, int], pos_embed: Tensor) -> Layout:
    attentions = _attentions(model)
    if not attentions:
        raise ValueError(_unknown(model))
    if not isinstance(pos_embed, Tensor):
        raise TypeError(f"pos_embed must be a tensor [N, D], got {type(pos_embed).__name__}")
    widths = {attention.query.weight.read().shape[1] for attention in attentions}
    if len(widths) > 1:
        raise ValueError(
            f"model must have attentions of one width D for one pos_embed, got {sorted(widths)}; call "
            "init_vit_ on its parts"
        )
    dim = widths.pop()
    height, width = grid_size
    if pos_embed.dim() == 3 and pos_embed.shape[0] == 1:
        pos_embed = pos_embed[0]
    if pos_embed.shape != (height * width, dim):
        raise ValueError(
            f"pos_embed must be [{height * width}, {dim}], a row for each token of the {height} x {width} "
            f"grid without class tokens, got {list(pos_embed.shape)}"
        )
    return by_hand(model, grid_size, attentions, pos_embed)


def _attentions(model: nn.Module) -> Sequence[SelfAttention]:
    found: list[SelfAttention] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        for adapt in ATTENTIONS:
            attention = adapt(module, name)
            if attention is not None:
                found.append(attention)
                inside |= set(map(id, module.modules()))
                break
    return found


def _unknown(model: nn.Module) -> str:
    attentions = [
        f"  {attention.name or '(the module itself)'}: {attention.num_heads} heads of {attention.head_dim}"
        for attention in _attentions(model)
    ]
    positions = [
        f"  {name}: {list(tensor.shape)}"
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if "pos" in name.rsplit(".", 1)[-1].lower()
    ]
    lines = [
        "model must have self-attentions over a token grid that convinit knows, got "
        f"{type(model).__qualname__} of {type(model).__module__}."
    ]
    lines += ["Attentions in it:", *attentions] if attentions else ["No attention in it is known."]
    if positions:
        lines += ["These look like position embeddings:", *positions]
    if attentions:
        lines.append(
            "Give the grid and the position embedding yourself: "
            "init_vit_(model, grid_size=(H, W), pos_embed=P), P [H·W, D] without class tokens."
        )
    lines.append(
        "Or write an adapter, see convinit.adapters.layout, and pass it: init_vit_(model, adapter=...)."
    )
    return "\n".join(lines)
