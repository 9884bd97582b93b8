"""MLP-Mixer of timm: the token-mixing MLPs become sums of impulse convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convinit import init as init_
from convinit.adapters.layout import Layout, LinearWeights
from convinit.adapters.request import Request
from convinit.adapters.types import child_name, is_a
from convinit.init._shared import random_of_same_norm
from convinit.offsets import impulse_targets
from convinit.records import LayerRecord


@dataclass(eq=False)
class TokenMixing:
    """The token-mixing MLP of a block, fc2(GELU(fc1(x))) over N tokens with T hidden units.

    `num_heads` is the number T // N of offsets that it has room for.
    """

    name: str
    reads: nn.Module
    fc1: LinearWeights
    fc2: LinearWeights
    num_heads: int
    tokens: int

    @property
    def frozen(self) -> bool:
        return self.fc1.frozen or self.fc2.frozen

    def position_map(self) -> Tensor:
        """What the hidden units of each offset read, as shares [heads, N, N]; the same for any image."""
        read = self.fc1.weight.read().abs()[: self.num_heads * self.tokens].view(-1, self.tokens, self.tokens)
        return read / read.sum(dim=2, keepdim=True).clamp(min=torch.finfo(read.dtype).tiny)

    def attention_map(self, x: Tensor) -> Tensor:
        return self.position_map().unsqueeze(0)


@dataclass(eq=False)
class MixerLayout(Layout):
    """The blocks of an MLP-Mixer."""

    def init_(self, request: Request, layers: Sequence[int], offsets: Tensor) -> list[LayerRecord]:
        request.refuse_additive(self.root)
        given = not request.by_newton or request.peak is not None or request.weight_norm is not None
        if request.draws or given:
            raise ValueError(
                "method must be impulse, scrambled, norm_matched or default, without fit, peak and "
                f"weight_norm, for {type(self.root).__name__}: it has no queries and keys, and its impulses "
                f"are exact; got method={request.method!r}"
            )
        chosen: list[TokenMixing] = [self.attentions[i] for i in layers]
        records = []
        of_layer = offsets.split([mixing.num_heads for mixing in chosen])
        for layer, mixing, own in zip(layers, chosen, of_layer, strict=True):
            targets = None
            if not mixing.frozen and request.fits:
                targets = self._set_mixing_(request, mixing, own)
            norms = [float(each.weight.read().norm()) for each in (mixing.fc1, mixing.fc2)]
            norm = torch.full(
                (mixing.num_heads,), math.sqrt(math.prod(norms) / mixing.num_heads), device="cpu"
            ).double()
            note = "token mixing is frozen: left alone" if mixing.frozen else None
            of_impulses = None if request.method == "scrambled" else own
            records.append(self.record(layer, targets, of_impulses, norm, note))
        return records

    def _set_mixing_(self, request: Request, mixing: TokenMixing, offsets: Tensor) -> Tensor:
        """Writes the token mixing; targets [heads, N].

        The controls take the place of the impulses: each group of hidden units reads the tokens in a random
        order, or reads and writes by random weights of the same norm.
        """
        weights = [mixing.fc1.weight, mixing.fc1.bias, mixing.fc2.weight, mixing.fc2.bias]
        values: list[Any] = [None if slot is None else slot.read() for slot in weights]
        fc1, fc1_bias, fc2, fc2_bias = values
        init_.impulse_token_mixing_(
            fc1, fc1_bias, fc2, fc2_bias, offsets, self.grid_size, padding_mode=request.padding_mode
        )
        targets = impulse_targets(offsets, self.grid_size, padding_mode=request.padding_mode)
        units = targets.numel()  # hidden units that have a token to read
        if request.method == "scrambled":
            draws = torch.rand(targets.shape, generator=request.generator, device="cpu")
            targets = draws.argsort(dim=1)  # a permutation for each offset
            fc1[:units] = torch.eye(mixing.tokens, device="cpu")[targets.flatten()].to(fc1)
        elif request.method == "norm_matched":
            for impulses in (fc1[:units], fc2[:, :units]):
                impulses.copy_(random_of_same_norm(impulses, request.generator))
        for slot, value in zip(weights, values, strict=True):
            if slot is not None:
                slot.write_(value)
        return targets

    def position_maps(self, layer: int) -> Tensor:
        return self.attentions[layer].position_map()


def adapt(module: Any, name: str) -> Layout | None:
    if not is_a(module, "timm.models.mlp_mixer.MlpMixer"):
        return None
    attentions = []
    for i, block in enumerate(module.blocks):
        if not is_a(block, "timm.models.mlp_mixer.MixerBlock"):
            return None
        mlp = block.mlp_tokens
        if not (isinstance(getattr(mlp, "fc1", None), nn.Linear) and isinstance(mlp.fc2, nn.Linear)):
            return None
        if mlp.fc2.in_features != mlp.fc1.out_features:
            return None  # gated
        hidden, tokens = mlp.fc1.weight.shape
        if hidden < tokens:
            raise ValueError(
                f"model must have a hidden unit for each token in its token mixing, got {hidden} units for "
                f"{tokens} tokens in block {i}"
            )
        full_name = child_name(name, f"blocks.{i}.mlp_tokens")
        attentions.append(
            TokenMixing(
                full_name, mlp, LinearWeights.of(mlp.fc1), LinearWeights.of(mlp.fc2), hidden // tokens, tokens
            )
        )
    return MixerLayout(name, module, tuple(module.stem.grid_size), attentions)
