"""convinit's own `SimpleViT` and `ConvInitAttention`: P goes into every layer by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convinit.adapters.additive import AdditiveLayout
from convinit.adapters.layout import Layout, Linear, SelfAttention, Slot, packed_qkv
from convinit.adapters.request import Request
from convinit.models import SimpleViT
from convinit.nn import ConvInitAttention


@dataclass(eq=False)
class OwnAttention(SelfAttention):
    """A ConvInitAttention. Model III has no W_q and W_k: Q = P W_q and K = P W_k are its parameters."""

    reads: ConvInitAttention

    def see(self, tokens: Tensor) -> Tensor:
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
        x = self.see(tokens) if self.reads.variant == "vanilla" else torch.zeros_like(tokens)
        weight = self.query.weight.tensor
        return self.attention_map(x.unsqueeze(0).to(weight))[0].float()


@dataclass(eq=False)
class OwnLayout(AdditiveLayout):
    """P is a constant that the model makes itself; the mix with the content is its `alpha`."""

    takes_alpha = True

    def _uses_subspace(self, request: Request) -> bool:
        return False

    def scale_(self, request: Request) -> None:
        if request.position_was_given or request.pos_embed_gain is not None:
            raise ValueError(
                "position and pos_embed_gain must be None for convinit's own models: alpha says how much "
                "of P they see"
            )
        if request.alpha is None:
            return
        for attention in self.attentions:
            attention.reads.alpha = request.alpha
        if isinstance(self.root, SimpleViT) and self.root.entry_alpha is not None:
            self.root.entry_alpha = request.alpha


def whole_pos_embed(module: ConvInitAttention) -> Tensor:
    return Slot(module.pos_embed).read().double()


def layout(module: nn.Module, name: str) -> Layout | None:
    if isinstance(module, SimpleViT):
        prefix = f"{name}." if name else ""
        layers = [(f"{prefix}blocks.{i}.attn", block.attn) for i, block in enumerate(module.blocks)]
        if not layers:
            return None
    elif isinstance(module, ConvInitAttention):
        layers = [(name, module)]
    else:
        return None
    first = layers[0][1]
    attentions = [_attention(layer, layer_name) for layer_name, layer in layers]
    return OwnLayout(name, module, first.grid_size, attentions, position=Slot(first.pos_embed))


def _attention(module: ConvInitAttention, name: str) -> OwnAttention:
    inner = module.num_heads * module.head_dim
    value = None if module.v is None else Linear.of(module.v)
    if module.variant == "III":
        query, key = Linear(Slot(module.q_map)), Linear(Slot(module.k_map))
    elif module.qkv is not None:
        query, key, value = packed_qkv(module.qkv, inner)
    else:
        assert module.qk is not None
        query, key = (Linear.of(module.qk, slice(i * inner, (i + 1) * inner)) for i in range(2))
    output = Linear.of(module.proj) if isinstance(module.proj, nn.Linear) else None
    sizes = (module.num_heads, module.head_dim, module.scale)
    return OwnAttention(name, module, *sizes, query, key, value, output)
