"""convinit's own `SimpleViT` and `ConvInitAttention`.

The vanilla SimpleViT adds P to its tokens, as models of other libraries do. In all others P goes into every
layer by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convinit.adapters.additive import AdditiveLayout
from convinit.adapters.calibrate import Plan
from convinit.adapters.layout import Layout, LinearWeights, SelfAttention, Slot, packed_qkv
from convinit.adapters.request import Request
from convinit.adapters.types import child_name
from convinit.models import SimpleViT
from convinit.nn import ConvInitAttention
from convinit.offsets import impulse_targets
from convinit.records import LayerRecord


@dataclass(eq=False)
class ConvInitSelfAttention(SelfAttention):
    """A ConvInitAttention. Model III has no W_q and W_k: Q = P W_q and K = P W_k are its parameters."""

    reads: ConvInitAttention

    def see(self, tokens: Tensor) -> Tensor:
        if self.norm is not None:
            return super().see(tokens)
        if self.reads.variant == "vanilla":
            return F.layer_norm(tokens, tokens.shape[1:])
        return (1 - self.reads.alpha) * tokens if self.reads.variant == "I" else tokens

    def set_qk_(self, wq: Tensor, wk: Tensor, offsets: Tensor | None) -> None:
        if self.reads.variant == "III":
            P = whole_pos_embed(self.reads)
            wq, wk = P @ wq.double(), P @ wk.double()
        self._write_qk_(wq, wk)
        if offsets is not None:
            self.reads.offsets.copy_(offsets)

    def _write_qk_(self, wq: Tensor, wk: Tensor) -> None:
        if self.reads.variant == "III":
            self.query.weight.write_(wq)
            self.key.weight.write_(wk.mT)
        else:
            super()._write_qk_(wq, wk)

    def qk_weights(self) -> tuple[Tensor, Tensor]:
        if self.reads.variant == "III":
            return self.query.weight.read(), self.key.weight.read().mT
        return super().qk_weights()

    def attention_map(self, x: Tensor) -> Tensor:
        return self.reads.attention_map(x).float()

    def position_map(self, tokens: Tensor) -> Tensor:
        if self.norm is not None:
            return super().position_map(tokens)
        x = self.see(tokens) if self.reads.variant == "vanilla" else torch.zeros_like(tokens)
        weight = self.query.weight.tensor
        return self.attention_map(x.unsqueeze(0).to(weight))[0].float()


@dataclass(eq=False)
class ConvInitLayout(AdditiveLayout):
    """P is a constant that the model makes itself; the mix with the content is its `alpha`."""

    takes_alpha = True

    def _init_(self, request: Request, *others: Any) -> list[LayerRecord]:
        if request.pos_embed_gain is not None or (request.position_was_given and self.content is None):
            raise ValueError(
                f"position and pos_embed_gain must be None for this {type(self.root).__name__}: alpha says "
                "how much of P it sees"
            )
        if request.alpha is not None:
            for attention in self.attentions:
                attention.reads.alpha = request.alpha
            if isinstance(self.root, SimpleViT) and self.root.entry_alpha is not None:
                self.root.entry_alpha = request.alpha
        return super()._init_(request, *others)

    def _uses_subspace(self, request: Request) -> bool:
        return self.content is not None and super()._uses_subspace(request)

    def scale_(self, request: Request) -> None:
        pass

    def _record(
        self, i: int, attention: SelfAttention, plan: Plan | None, seen: Any, request: Request, *notes: Any
    ) -> LayerRecord:
        if plan is None and request.method == "default":  # left as it is; the layer keeps its offsets
            layer: Any = attention.reads
            offsets, padding_mode = layer.offsets.cpu(), layer.init_options.padding_mode
            targets = impulse_targets(offsets, self.grid_size, padding_mode=padding_mode)
            plan = Plan(attention.qk_weights(), targets, offsets)
        return super()._record(i, attention, plan, seen, request, *notes)


def whole_pos_embed(module: ConvInitAttention) -> Tensor:
    return Slot(module.pos_embed).read().double()


def adapt(module: nn.Module, name: str) -> Layout | None:
    if isinstance(module, SimpleViT):
        return _simple_vit(module, name)
    if not isinstance(module, ConvInitAttention):
        return None
    return ConvInitLayout(
        name, module, module.grid_size, [_attention(module, name)], position=Slot(module.pos_embed)
    )


def _simple_vit(model: SimpleViT, name: str) -> Layout | None:
    if len(model.blocks) == 0:
        return None
    writers = model.writers()
    attentions = [
        _attention(block.attn, child_name(name, f"blocks.{i}.attn"), block.norm if writers else None)
        for i, block in enumerate(model.blocks)
    ]
    position = Slot(model.pos_embed if writers else model.blocks[0].attn.pos_embed)
    layout = ConvInitLayout(name, model, model.grid_size, attentions, position=position)
    if writers:
        layout.content = model.patch_embed
        layout.writers = [LinearWeights.of(writer) for writer in writers]
        layout.between = [model.patch_embed[-1]]
        layout.image_shape = lambda grid_size: (model.channels, *model.image_size)
    return layout


def _attention(module: ConvInitAttention, name: str, norm: nn.Module | None = None) -> ConvInitSelfAttention:
    inner = module.num_heads * module.head_dim
    value = None if module.v is None else LinearWeights.of(module.v)
    if module.variant == "III":
        query, key = LinearWeights(Slot(module.q_map)), LinearWeights(Slot(module.k_map))
    elif module.qkv is not None:
        query, key, value = packed_qkv(module.qkv, inner)
    else:
        assert module.qk is not None
        query, key = (LinearWeights.of(module.qk, slice(i * inner, (i + 1) * inner)) for i in range(2))
    output = LinearWeights.of(module.proj) if isinstance(module.proj, nn.Linear) else None
    sizes = (module.num_heads, module.head_dim, module.scale)
    return ConvInitSelfAttention(name, module, *sizes, query, key, value, output, norm)
