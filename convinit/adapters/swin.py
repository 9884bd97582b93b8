"""Swin: the impulse goes into the relative position bias table of every window attention.

timm's, torchvision's and Hugging Face's SwinTransformer (version 1; version 2 computes its bias by an MLP).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convinit import init as init_
from convinit._checks import check_grid_size
from convinit.adapters.layout import Layout, LinearWeights, SelfAttention, Slot, packed_qkv
from convinit.adapters.request import Request
from convinit.adapters.types import child_name, is_a
from convinit.init._shared import random_of_same_norm
from convinit.init.bias_table import BiasTableFit
from convinit.records import LayerRecord


@dataclass(eq=False)
class WindowAttention(SelfAttention):
    """Attention within windows; masks of shifted windows are left out of its maps.

    Attributes:
        table: [(2H − 1)(2W − 1), heads], the relative position bias.
        window_size: (H, W).
        shift: by which torchvision's module rolls the tokens that it gets as [B, height, width, D].
    """

    table: Slot | None = None
    window_size: tuple[int, int] = (1, 1)
    shift: tuple[int, int] = (0, 0)

    @property
    def frozen(self) -> bool:
        assert self.table is not None
        return self.table.frozen

    @torch.no_grad()
    def attention_map(self, x: Tensor) -> Tensor:
        assert self.table is not None
        q, k = self.queries_keys(self._windows(x) if x.dim() == 4 else x)
        bias = self.table.read().to(q)[_index(*self.window_size)]  # [N, N, heads]
        return (self.scale * q @ k.mT + bias.permute(2, 0, 1)).softmax(dim=-1)

    def position_map(self, tokens: Tensor) -> Tensor:
        """Of the table alone."""
        assert self.table is not None
        bias = self.table.read()[_index(*self.window_size)]
        return bias.permute(2, 0, 1).softmax(dim=-1)

    def _windows(self, x: Tensor) -> Tensor:
        """[B, height, width, D] -> [B · windows, N, D]."""
        rows, columns = self.window_size
        x = F.pad(x, (0, 0, 0, -x.shape[2] % columns, 0, -x.shape[1] % rows))
        shift = [
            0 if w >= size else s
            for s, w, size in zip(self.shift, self.window_size, x.shape[1:3], strict=True)
        ]
        x = torch.roll(x, (-shift[0], -shift[1]), dims=(1, 2))
        x = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))  # [B, ·, rows, ·, columns, D]
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _index(height: int, width: int) -> Tensor:
    """[N, N]: the table's row for each query and key of a window."""
    y, x = torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in (height, width))).unbind(1)
    down, right = y[:, None] - y + height - 1, x[:, None] - x + width - 1
    return down * (2 * width - 1) + right


def _far_shifts(window_size: tuple[int, int], kernel_size: int) -> Tensor:
    """[K, 2]: the shifts of a window that wraps around which are no offsets of f×f; all of them if none is.

    A table gives all tokens one shift, so that a control can take no more from the convolution than that it
    is near.
    """
    shifts = torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in window_size))
    wrapped = torch.minimum(shifts, torch.tensor(window_size, device="cpu") - shifts)
    far = shifts[(wrapped > kernel_size // 2).any(dim=1)]
    return far if len(far) else shifts


def _impulses(
    request: Request, attention: WindowAttention, offsets: Tensor, padding_mode: str | None = None
) -> BiasTableFit:
    assert attention.table is not None
    return init_.impulse_bias_table_(
        attention.table.read(), offsets, attention.window_size, peak=request.target_peak,
        value=request.weight_norm, padding_mode=padding_mode or request.padding_mode,
    )  # fmt: skip


def _impulses_or_control(
    request: Request, attention: WindowAttention, fit: BiasTableFit, kernel_size: int
) -> tuple[Tensor, Tensor]:
    """The bias table, and its targets [heads, N]; of random tables those of the impulses."""
    if request.method == "norm_matched":
        return random_of_same_norm(fit.bias_table, request.generator, dim=0), fit.targets
    if request.method == "scrambled":
        far = _far_shifts(attention.window_size, kernel_size)
        picked = torch.randint(len(far), (attention.num_heads,), generator=request.generator, device="cpu")
        fit = _impulses(request, attention, far[picked], padding_mode="circular")
    return fit.bias_table, fit.targets


@dataclass(eq=False)
class WindowLayout(Layout):
    """All window attentions of a model, from the first stage to the last; the grid is the first's window."""

    def init_(self, request: Request, layers: Sequence[int], offsets: Tensor) -> list[LayerRecord]:
        request.refuse_additive(self.root)
        request.check_biases(
            self.root, controls=("scrambled", "norm_matched"), padding_modes=("zeros", "circular")
        )
        chosen: dict[int, WindowAttention] = {i: self.attentions[i] for i in layers}
        kernel_size = request.window([attention.window_size for attention in chosen.values()])
        of_layer = offsets.split([attention.num_heads for attention in chosen.values()])
        dealt = dict(zip(chosen, of_layer, strict=True))
        live = {
            i: attention
            for i, attention in chosen.items()
            if not (attention.query.frozen or attention.key.frozen if request.draws else attention.frozen)
        }
        # Checked before anything is written.
        impulses = {i: _impulses(request, each, dealt[i]) for i, each in live.items()} if request.fits else {}
        notes = {i: None if i in live else "frozen: left alone" for i in chosen}
        if request.values == "mimetic":  # before the controls draw: theirs are those of the impulses
            notes |= {i: attention.set_values_(request.generator) for i, attention in live.items()}
        records = []
        for i, attention in chosen.items():
            assert attention.table is not None
            targets, own = None, None if request.method == "scrambled" else dealt[i]
            if i in impulses:
                table, targets = _impulses_or_control(request, attention, impulses[i], kernel_size)
                attention.table.write_(table)
            elif request.draws and i in live:
                attention.draw_qk_(request)
            norm = attention.table.read().double().norm(dim=0)
            if request.draws:
                wq, wk = attention.qk_weights()
                norm = (wq.double().norm(dim=(1, 2)) * wk.double().norm(dim=(1, 2))).sqrt()
            records.append(self.record(i, targets, own, norm, notes[i]))
        return records

    def position_maps(self, layer: int) -> Tensor:
        return self.attentions[layer].position_map(torch.empty(0, device="cpu"))

    def grid_of(self, layer: int) -> tuple[int, int]:
        return self.attentions[layer].window_size


# --- the libraries' models --------------------------------------------------------------------------------

_MODELS = (
    "timm.models.swin_transformer.SwinTransformer",
    "torchvision.models.swin_transformer.SwinTransformer",
    "transformers.models.swin.modeling_swin.SwinModel",
)
_ATTENTIONS = (
    "timm.models.swin_transformer.WindowAttention",
    "torchvision.models.swin_transformer.ShiftedWindowAttention",
    "transformers.models.swin.modeling_swin.SwinAttention",
)


def adapt(module: Any, name: str) -> Layout | None:
    if not is_a(module, *_MODELS):
        return None
    # torchvision has both versions in one class.
    if any(type(child).__name__ == "ShiftedWindowAttentionV2" for child in module.modules()):
        raise ValueError(
            "model must be Swin version 1: version 2 has no bias table that could hold an impulse"
        )
    attentions = [
        _attention(child, child_name(name, child_path))
        for child_path, child in module.named_modules()
        if is_a(child, *_ATTENTIONS)
    ]
    return WindowLayout(name, module, attentions[0].window_size, attentions) if attentions else None


def _attention(module: Any, name: str) -> WindowAttention:
    holder = getattr(module, "relative_position_bias", module)  # Hugging Face's has a module of its own
    window = check_grid_size(tuple(holder.window_size))
    table = Slot(holder.relative_position_bias_table)
    if isinstance(getattr(module, "qkv", None), nn.Linear):
        inner = module.qkv.weight.shape[0] // 3
        query, key, value = packed_qkv(module.qkv, inner)
        output, heads = module.proj, module.num_heads
    else:
        query, key, value = (
            LinearWeights.of(layer) for layer in (module.q_proj, module.k_proj, module.v_proj)
        )
        inner, output, heads = module.q_proj.weight.shape[0], module.o_proj, module.num_attention_heads
    rank = inner // heads
    return WindowAttention(
        name, module, heads, rank, rank**-0.5, query, key, value, LinearWeights.of(output), table=table,
        window_size=window, shift=tuple(getattr(module, "shift_size", (0, 0))),
    )  # fmt: skip
