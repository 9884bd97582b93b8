"""Models with rotary position embedding (RoPE): the impulse goes into the query and key biases.

timm's `Eva` class with the "rope" attention (vit_*_rope_*, vit_pe_*), and Hugging Face's DINOv3ViT with
key_bias=True. A shift is a rotation there, so two biases make an impulse that no image disturbs; without a
bias on the keys there is nothing that could hold it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convinit import init as init_
from convinit.adapters.layout import Layout, LinearWeights, SelfAttention, packed_qkv
from convinit.adapters.request import Request
from convinit.adapters.types import child_name, is_a, learned_norm
from convinit.records import LayerRecord


@dataclass(eq=False)
class RotaryAttention(SelfAttention):
    """A self-attention that turns queries and keys of patches by angles.

    Attributes:
        angles: returns the model's angles as they are now, [N, m] or [heads, N, m] in rad, of the patch
            tokens; class and register tokens are not turned.
        pairs: "interleaved" or "half", see :func:`convinit.init.rotary_impulse_qk_`.
    """

    angles: Callable[[], Tensor] | None = None
    pairs: str = "interleaved"

    @property
    def frozen(self) -> bool:
        return any(linear.bias is None or linear.bias.frozen for linear in (self.query, self.key))

    def queries_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.angles is not None
        q, k = super().queries_keys(x)
        angles = self.angles().to(q)
        return _turned(q, angles, self.pairs), _turned(k, angles, self.pairs)

    def position_map(self, tokens: Tensor) -> Tensor:
        """Of the biases alone: tokens [T, D] are not looked at but for their number."""
        return self.attention_map(torch.zeros_like(tokens).unsqueeze(0))[0]


@dataclass(eq=False)
class RotaryLayout(Layout):
    """Attentions that know positions by rotation.

    Attributes:
        num_prefix: class and register tokens.
    """

    num_prefix: int = 0

    def init_(self, request: Request, layers: Sequence[int], offsets: Tensor) -> list[LayerRecord]:
        request.refuse_additive(self.root)
        request.check_biases(self.root, controls=("norm_matched",))
        chosen: dict[int, RotaryAttention] = {i: self.attentions[i] for i in layers}
        of_layer = offsets.split([attention.num_heads for attention in chosen.values()])
        dealt = dict(zip(chosen, of_layer, strict=True))
        live = [i for i, attention in chosen.items() if not attention.frozen]
        targets: dict[int, Tensor] = {}
        if request.draws:
            live = [i for i in live if not (chosen[i].query.frozen or chosen[i].key.frozen)]
            for i in live:
                chosen[i].draw_qk_(request)
        elif request.fits and live:
            found = self._set_biases_(request, [chosen[i] for i in live], torch.cat([dealt[i] for i in live]))
            targets = dict(zip(live, found, strict=True))
        records = []
        for i, attention in chosen.items():
            note = None if i in live else "queries and keys are frozen: left alone"
            if request.values == "mimetic" and i in live:
                note = attention.set_values_(request.generator)
            norm = torch.stack(_biases(attention)).double().norm(dim=2).prod(dim=0).sqrt()
            records.append(self.record(i, targets.get(i), dealt[i], norm, note))
        return records

    def position_maps(self, layer: int) -> Tensor:
        height, width = self.grid_size
        attention = self.attentions[layer]
        dim = attention.query.weight.read().shape[1]
        return attention.position_map(torch.empty(self.num_prefix + height * width, dim, device="cpu"))

    def num_tokens(self, layer: int) -> int:
        return self.num_prefix + super().num_tokens(layer)

    def _set_biases_(
        self, request: Request, attentions: Sequence[RotaryAttention], offsets: Tensor
    ) -> Sequence[Tensor]:
        """Writes the biases of all layers in one fit; targets [heads, N] of each."""
        heads = [attention.num_heads for attention in attentions]
        bq, bk = torch.empty(2, sum(heads), attentions[0].head_dim, device="cpu")
        fit = init_.rotary_impulse_qk_(
            bq,
            bk,
            _of_all_heads(attentions),
            offsets,
            self.grid_size,
            scale=attentions[0].scale,
            peak=request.target_peak,
            weight_norm=request.weight_norm,
            pairs=attentions[0].pairs,
            generator=request.generator,
        )
        if request.method == "norm_matched":
            pair = bq.unsqueeze(1), bk.unsqueeze(1)
            init_.norm_matched_qk_(*pair, fit.weight_norm, generator=request.generator)
        for attention, q, k in zip(attentions, bq.split(heads), bk.split(heads), strict=True):
            for linear, bias in ((attention.query, q), (attention.key, k)):
                assert linear.bias is not None
                linear.bias.write_(bias.flatten())
        return fit.targets.split(heads)


def _of_all_heads(attentions: Sequence[RotaryAttention]) -> Tensor:
    """The angles [N, m] of all, or [heads, N, m] where they differ."""
    parts = [attention.angles() for attention in attentions if attention.angles is not None]
    if all(part.dim() == 2 and torch.equal(part, parts[0]) for part in parts):
        return parts[0]
    return torch.cat([part.expand(a.num_heads, -1, -1) for part, a in zip(parts, attentions, strict=True)])


def _biases(attention: RotaryAttention) -> tuple[Tensor, Tensor]:
    """Query and key biases [heads, r]."""
    shape = (attention.num_heads, attention.head_dim)
    q, k = (linear.bias.read().view(shape) for linear in (attention.query, attention.key) if linear.bias)
    return q, k


def _turned(x: Tensor, angles: Tensor, pairs: str) -> Tensor:
    """The last N tokens of x [B, heads, T, r], turned by angles [N, m] or [heads, N, m]."""
    tokens, m = angles.shape[-2:]
    still, turned = x.split([x.shape[2] - tokens, tokens], dim=2)
    turned, rest = turned.split([2 * m, x.shape[3] - 2 * m], dim=3)
    cos, sin = angles.cos(), angles.sin()
    if pairs == "interleaved":
        a, b = turned.unflatten(3, (m, 2)).unbind(4)
        both = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=4).flatten(3)
    else:
        a, b = turned.chunk(2, dim=3)
        both = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=3)
    return torch.cat([still, torch.cat([both, rest], dim=3)], dim=2)


# --- the libraries' models --------------------------------------------------------------------------------


def adapt(module: Any, name: str) -> Layout | None:
    if is_a(module, "timm.models.eva.Eva") and module.rope is not None:
        return _eva(module, name)
    if is_a(module, "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTModel"):
        return _dinov3(module, name)
    return None


def _eva(module: Any, name: str) -> Layout:
    names = [child_name(name, f"blocks.{i}.attn") for i in range(len(module.blocks))]
    for full_name, block in zip(names, module.blocks, strict=True):
        attn = block.attn
        known = is_a(attn, "timm.layers.attention.AttentionRope") and attn.qkv is not None
        biased = known and attn.qkv.bias is not None and learned_norm(attn.q_norm) is None
        if not biased:
            raise ValueError(_no_bias(full_name, attn))
    attentions = []
    grid_size = tuple(module.patch_embed.grid_size)
    for i, (full_name, block) in enumerate(zip(names, module.blocks, strict=True)):
        attn = block.attn
        pairs = "half" if attn.rotate_half else "interleaved"
        query, key, value = packed_qkv(attn.qkv, attn.num_heads * attn.head_dim)
        output = LinearWeights.of(attn.proj)
        layer = i if module.rope_mixed else None
        angles = functools.partial(_eva_angles, module.rope, grid_size, layer, pairs)
        sizes = (attn.num_heads, attn.head_dim, float(attn.scale))
        attentions.append(
            RotaryAttention(
                full_name, attn, *sizes, query, key, value, output, block.norm1, angles=angles, pairs=pairs
            )
        )
    return RotaryLayout(name, module, grid_size, attentions, num_prefix=module.num_prefix_tokens)


def _eva_angles(rope: Any, grid_size: tuple[int, int], layer: int | None, pairs: str) -> Tensor:
    with _evaluating(rope):
        cached = getattr(rope, "feat_shape", None) is not None
        table = rope.get_embed() if cached else rope.get_embed(shape=grid_size)
    table = table.detach().cpu() if layer is None else table[layer].detach().cpu()
    return init_.rotary_angles(*table.chunk(2, dim=-1), pairs=pairs)  # sines, then cosines


def _dinov3(module: Any, name: str) -> Layout:
    embeddings, config = module.embeddings, module.config
    image, patch = (
        (size, size) if isinstance(size, int) else tuple(size)
        for size in (config.image_size, config.patch_size)
    )
    grid_size = (image[0] // patch[0], image[1] // patch[1])
    angles = functools.partial(_dinov3_angles, module.rope_embeddings, image)
    attentions = []
    for i, block in enumerate(module.model.layer):
        attn, full_name = block.attention, child_name(name, f"model.layer.{i}.attention")
        if attn.q_proj.bias is None or attn.k_proj.bias is None:
            raise ValueError(_no_bias(full_name, attn))
        sizes = (attn.num_heads, attn.head_dim, float(attn.scaling))
        attentions.append(
            RotaryAttention(
                full_name, attn, *sizes, LinearWeights.of(attn.q_proj), LinearWeights.of(attn.k_proj),
                LinearWeights.of(attn.v_proj), LinearWeights.of(attn.o_proj), block.norm1, angles=angles,
                pairs="half",
            )
        )  # fmt: skip
    return RotaryLayout(
        name, module, grid_size, attentions, num_prefix=1 + embeddings.config.num_register_tokens
    )


def _dinov3_angles(rope: Any, image: tuple[int, int]) -> Tensor:
    with _evaluating(rope):
        cos, sin = rope(torch.zeros(1, 1, *image, device=rope.inv_freq.device))
    return init_.rotary_angles(sin.cpu(), cos.cpu(), pairs="half")


@contextmanager
def _evaluating(rope: nn.Module) -> Iterator[None]:
    """Without the noise that some models add to their angles in training."""
    mode = rope.training
    rope.eval()
    try:
        yield
    finally:
        rope.train(mode)


def _no_bias(name: str, attention: nn.Module) -> str:
    return (
        "model must have biases on queries and keys, without a norm behind them, for an impulse in rotary "
        f"position embedding: nothing else in it is the same for every image. {name} of type "
        f"{type(attention).__name__} has none that is trained and saved. Other timm models do, for example "
        "vit_small_patch16_rope_224; DINOv3ViT of transformers does with key_bias=True"
    )
