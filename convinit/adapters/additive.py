"""Models that add a position embedding to their tokens: queries and keys are fitted to it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convinit import init as init_
from convinit.adapters.layout import Layout, SelfAttention, Slot, apply_norm, is_sharded
from convinit.adapters.report import LayerRecord, measured
from convinit.adapters.request import Request
from convinit.fit import fit_qk
from convinit.offsets import impulse_targets

# The share s of P in the norm of a token: the logits of the positions shrink by s². Of a peak of 0.7 in 196
# tokens, a share of 0.9 leaves 0.4, and 0.5 leaves 0.02. Much more drowns the image instead.
_SMALL_SHARE, _GOOD_SHARE = 0.8, 0.9


@dataclass(eq=False)
class AdditiveLayout(Layout):
    """Tokens are content + P, perhaps behind class and register tokens.

    Attributes:
        position: P of the patch tokens, [N, D].
        prefix: class and register tokens, each [k, D], in their order before the patches.
        prefix_position: what is added to them, [n, D]; None: nothing.
        entry: what all tokens go through before the first layer (CLIP's norm_pre), or None.
        content: the last module of the patch embedding that has a weight; its weight and bias scale the
            content. None: unknown.
    """

    position: Slot | None = None
    prefix: Sequence[Slot] = ()
    prefix_position: Slot | None = None
    entry: nn.Module | None = None
    content: Any = None

    def init_(self, request: Request, layers: Sequence[int], offsets: Tensor) -> list[LayerRecord]:
        assert self.position is not None
        P = self.position.read()
        self._check_finite(layers)
        if (P == P[0]).all() and request.method not in ("mimetic", "keep"):
            raise ValueError(
                "model must have a position embedding that differs between tokens, but that of "
                f"{type(self.root).__name__} is the same everywhere (some models start so); fill it first, "
                "for example with convinit.nn.sincos_2d(grid_size, D)"
            )
        self.scale_(request)
        tokens, prefix = self.tokens()
        chosen: dict[int, SelfAttention] = {i: self.attentions[i] for i in layers}
        of_layer = offsets.split([attention.num_heads for attention in chosen.values()])
        dealt = dict(zip(chosen, of_layer, strict=True))
        live = {i: attention for i, attention in chosen.items() if not attention.frozen}
        targets: dict[int, Tensor] = {}
        temperature: dict[int, str] = {}  # what was done about qk_norm
        if request.method == "mimetic":
            for attention in live.values():
                attention.set_mimetic_qk_(request.generator)
        elif request.method != "keep":
            for group in _alike(live, tokens):
                members = {i: live[i] for i in group}
                targets |= self._set_fitted_(request, members, tokens, prefix, dealt, temperature)
        records = []
        for i, attention in chosen.items():
            notes: list[str | None] = []
            if i not in live:
                notes.append("queries and keys are frozen: left alone")
            notes.append(temperature.get(i))
            if i in live and request.values == "mimetic":
                notes.append(attention.set_values_(request.generator))
            wq, wk = attention.qk_weights()
            norm = (wq.double().norm(dim=(1, 2)) * wk.double().norm(dim=(1, 2))).sqrt()
            own = None if request.method == "scrambled" else dealt[i]
            records.append(self.record(i, targets.get(i), own, norm, "; ".join(filter(None, notes))))
        return records

    def _check_finite(self, layers: Sequence[int]) -> None:
        """A diverged checkpoint is named before anything is written."""
        assert self.position is not None
        tokens, _ = self.tokens()
        parts = {"its position embedding": self.position.read(), "its class or register tokens": tokens}
        for attention in (self.attentions[i] for i in layers):
            parts[f"the norm before {attention.name}"] = attention.see(tokens)
        for part, values in parts.items():
            if not values.isfinite().all():
                raise ValueError(
                    f"model must hold finite numbers, but {part} holds NaN or infinity: has it diverged?"
                )

    def position_maps(self, layer: int) -> Tensor:
        return self.attentions[layer].position_map(self.tokens()[0])

    def num_tokens(self, layer: int) -> int:
        return len(self.tokens()[0])

    def tokens(self) -> tuple[Tensor, int]:
        """Class and register tokens and P as they enter the first layer, [n + N, D], and n."""
        assert self.position is not None
        P = self.position.read()
        prefix = torch.cat([P[:0], *(slot.read().to(P) for slot in self.prefix)])
        if self.prefix_position is not None:
            prefix = prefix + self.prefix_position.read()
        return apply_norm(self.entry, torch.cat([prefix, P])), len(prefix)

    # --- content against position -------------------------------------------------------------------------

    def scale_(self, request: Request) -> None:
        """alpha and pos_embed_gain, into the weights; a warning where P is too small to carry a map."""
        assert self.position is not None
        alpha, gain = request.alpha, request.pos_embed_gain
        if alpha is not None:
            if self.content is None:
                raise ValueError(
                    f"alpha must be None for {type(self.root).__name__}: its patch embedding is unknown"
                )
            if alpha == 0:
                raise ValueError("alpha must be above 0: at 0 the image would never reach the model")
            weights = [self.content.weight, getattr(self.content, "bias", None)]
            _rescale_(self.root, "content", [Slot(w) for w in weights if w is not None], alpha)
        if alpha is not None or gain is not None:
            self._check_saved()
            factor = (1.0 if gain is None else gain) * (1.0 if alpha is None else 1 - alpha)
            _rescale_(self.root, "position", [self.position], factor)
        share = self.position_share()
        normed = any(attention.norm is not None for attention in self.attentions)
        if alpha is None and gain is None and normed and share is not None and share < _SMALL_SHARE:
            needed = math.ceil(math.sqrt((1 - share**2) / (1 - _GOOD_SHARE**2)) * _GOOD_SHARE / share)
            warnings.warn(
                f"the position embedding makes up only {share:.2g} of the norm of a token (estimated for "
                "standardised pixels); the content will blur the maps that are fitted to it by the square of "
                f"that. Enlarge it with pos_embed_gain, about {needed} (arXiv 2505.19985 uses 18), or scale "
                "the content down with alpha; images= measures the maps that remain",
                stacklevel=5,  # past this layout, init_vit_ and its no_grad, to the caller
            )

    def _check_saved(self) -> None:
        """A P that is to be scaled must be the model's own, and saved with it."""
        assert self.position is not None
        memory = _memory(self.position.tensor)
        if any(memory == _memory(tensor) for tensor in self.root.state_dict(keep_vars=True).values()):
            return
        kept = (*vars(self.root).values(), *self.root.buffers())
        if not any(isinstance(tensor, Tensor) and memory == _memory(tensor) for tensor in kept):
            raise ValueError(
                "pos_embed must be a parameter or buffer of the model, or a view of one, where it is to be "
                "scaled: scaling a copy would not reach the model"
            )
        warnings.warn(
            f"the position embedding of {type(self.root).__name__} is not in its state_dict. Before these "
            "weights are loaded into a new model, scale its P too: "
            'init_vit_(new, method="keep", values="keep", pos_embed_gain=...)',
            stacklevel=6,
        )

    def position_share(self) -> float | None:
        """rms(P) / rms(content + P), the content estimated from its last weight; None: unknown."""
        assert self.position is not None
        if self.content is None:
            return None
        weight = Slot(self.content.weight).read()
        # A LayerNorm's output has its weight's mean square; a projection of white pixels that of its rows.
        content = weight.square().mean() if weight.dim() == 1 else weight.flatten(1).square().sum(1).mean()
        P = self.position.read()
        position = (P - P.mean(dim=0)).square().mean()
        return float((position / (position + content)).sqrt())

    # --- queries and keys ---------------------------------------------------------------------------------

    def _set_fitted_(
        self,
        request: Request,
        members: Mapping[int, SelfAttention],
        tokens: Tensor,
        prefix: int,
        dealt: Mapping[int, Tensor],
        temperature: dict[int, str],
    ) -> dict[int, Tensor]:
        """Sets layers that see the same P, in one fit; targets [heads, N] of each."""
        first, generator = next(iter(members.values())), request.generator
        heads = [attention.num_heads for attention in members.values()]
        seen = first.see(tokens)
        P = _without(seen[prefix:], seen[:prefix])
        offsets = torch.cat([dealt[i] for i in members])
        # A LayerNorm of queries takes off their mean over r: one direction less, and none of it is wasted.
        rank = first.head_dim - first.has_qk_norm
        weight_norm: float | Tensor
        if request.method == "norm_matched" and request.weight_norm is not None:
            wq, wk = torch.empty(2, len(offsets), P.shape[1], rank, device="cpu")
            weight_norm = request.weight_norm
            targets = impulse_targets(offsets, self.grid_size, padding_mode=request.padding_mode)
        else:
            fit = fit_qk(
                P, offsets, self.grid_size, rank, scale=first.scale, method=request.fit_method(heads[0]),
                weight_norm=request.weight_norm, peak=request.peak, padding_mode=request.padding_mode,
                generator=generator,
            )  # fmt: skip
            wq, wk, weight_norm, targets = fit.wq, fit.wk, fit.weight_norm, fit.targets
            if first.has_qk_norm and request.target_peak is not None:
                # The weights' norm is divided out there, so that of the norms is what the controls share.
                parts = zip(*self._parts(first, heads, wq, wk, targets), members.items(), strict=True)
                for own_wq, own_wk, own_targets, (i, attention) in parts:
                    attention.set_qk_(own_wq, own_wk, dealt[i])
                    temperature[i] = _set_temperature_(attention, tokens, own_targets, request.target_peak)
        if request.method == "norm_matched":
            init_.norm_matched_qk_(wq, wk, weight_norm, generator=generator)
        elif request.method == "scrambled":
            scrambled = init_.scrambled_qk_(
                wq, wk, P, scale=first.scale, weight_norm=weight_norm, generator=generator
            )
            targets = scrambled.targets
        of_layer = {}
        parts = zip(*self._parts(first, heads, wq, wk, targets), members.items(), strict=True)
        for own_wq, own_wk, own_targets, (i, attention) in parts:
            attention.set_qk_(own_wq, own_wk, None if request.method == "scrambled" else dealt[i])
            of_layer[i] = own_targets
        return of_layer

    @staticmethod
    def _parts(
        first: SelfAttention, heads: list[int], wq: Tensor, wk: Tensor, targets: Tensor
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """wq, wk [heads, D, r] and targets of each layer; with qk_norm queries and keys of sum zero."""
        if first.has_qk_norm:
            centred = _zero_mean_basis(first.head_dim).to(wq)
            wq, wk = wq @ centred, wk @ centred
        return wq.split(heads), wk.split(heads), targets.split(heads)


def _set_temperature_(attention: SelfAttention, tokens: Tensor, targets: Tensor, peak: float) -> str:
    """With qk_norm the weights' norm is divided out: the norms' own weights set the peak instead."""
    weights: list[Any] = [
        getattr(norm, "weight", None) for norm in (attention.query_norm, attention.key_norm)
    ]
    if any(weight is None for weight in weights):
        return "qk_norm has no weight: how sharp the map is cannot be chosen"
    if any(not weight.requires_grad for weight in weights):
        return "qk_norm is frozen: how sharp the map is cannot be chosen"

    before = [Slot(weight).read() for weight in weights]

    def reached(gain: float) -> float:
        for weight in weights:
            Slot(weight).write_(torch.full(weight.shape, gain, device="cpu"))
        return float(measured(attention.position_map(tokens), targets)["peak"].mean())

    low, high = 0.1, 10.0
    if reached(high) < peak:
        for weight, values in zip(weights, before, strict=True):
            Slot(weight).write_(values)
        return f"qk_norm: peak {peak} is out of reach; the norms were left as they were"
    for _ in range(12):  # to a thousandth of the gain
        middle = math.sqrt(low * high)
        low, high = (middle, high) if reached(middle) < peak else (low, middle)
    reached(high)
    return f"qk_norm: weight of its norms set to {high:.2f}"


def _alike(live: Mapping[int, SelfAttention], tokens: Tensor) -> list[list[int]]:
    """Groups of layers that one fit serves: the same tokens seen, the same rank and scale."""
    groups: list[tuple[tuple, Tensor, list[int]]] = []
    for i, attention in live.items():
        key, seen = (attention.head_dim, attention.scale, attention.has_qk_norm), attention.see(tokens)
        for other_key, other, group in groups:
            if key == other_key and torch.equal(seen, other):
                group.append(i)
                break
        else:
            groups.append((key, seen, [i]))
    return [group for *_, group in groups]


def _without(P: Tensor, prefix: Tensor) -> Tensor:
    """P [N, D] less what lies in the span of the prefix rows [n, D].

    Weights fitted to it are orthogonal to those rows: class and register tokens get logits of zero, near the
    middle of those that patches have, and P itself has the same map.
    """
    if len(prefix) == 0:
        return P
    U, S, _ = torch.linalg.svd(prefix.double().mT, full_matrices=False)
    basis = U[:, S > 1e-6 * S[:1]]
    return (P.double() - P.double() @ basis @ basis.mT).to(P)


def _zero_mean_basis(rank: int) -> Tensor:
    """[r − 1, r] with orthonormal rows that sum to zero."""
    # The discrete cosines without the constant one.
    k = torch.arange(1, rank, dtype=torch.float64, device="cpu").unsqueeze(1)
    n = torch.arange(rank, dtype=torch.float64, device="cpu") + 0.5
    return math.sqrt(2 / rank) * torch.cos(math.pi * k * n / rank)


def _memory(tensor: Tensor) -> Any:
    """The storage that a tensor, perhaps a view, lies in."""
    return id(tensor) if is_sharded(tensor) else tensor.untyped_storage().data_ptr()


def _rescale_(root: nn.Module, key: str, slots: Sequence[Slot], factor: float) -> None:
    """Multiplies by `factor`, once: what an earlier call did is undone first, unless values changed since."""
    record = root.__dict__.setdefault("_convinit_scales", {})

    def size() -> float:
        return math.sqrt(sum(float(slot.read().double().square().sum()) for slot in slots))

    earlier, left = record.get(key, (1.0, None))
    if left is None or abs(size() - left) > 1e-3 * left:
        earlier = 1.0
    if factor != earlier:
        for slot in slots:
            slot.write_(slot.read() * (factor / earlier))
    record[key] = (factor, size())
