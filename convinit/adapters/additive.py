"""Models that add a position embedding to their tokens: queries and keys are fitted to it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convinit.adapters.calibrate import Plan, Seen, calibrate_, qk_norm_weights
from convinit.adapters.layout import Layout, LinearWeights, SelfAttention, Slot, apply_norm, memory_of
from convinit.adapters.measure import output_of
from convinit.adapters.request import Request
from convinit.adapters.subspace import (
    MIMETIC_CONTENT,
    MOST_OF_WIDTH,
    POSITION_TO_CONTENT,
    looks_drawn,
    separate_,
    separate_writer_,
    smooth_position,
)
from convinit.adapters.synthetic import synthetic_images
from convinit.fit.api import SMALLEST_POSITION
from convinit.init.query_key import fitted_qk
from convinit.init.subspace import row_space
from convinit.records import LayerRecord, measured


@dataclass(eq=False)
class AdditiveLayout(Layout):
    """Tokens are content + P, perhaps behind class and register tokens.

    Attributes:
        position: P of the patch tokens, [N, D].
        prefix: class and register tokens, each [k, D], in their order before the patches.
        prefix_position: what is added to the first of them, [n, D]; None: nothing.
        entry: what all tokens go through before the first layer (CLIP's norm_pre), or None.
        content: the module whose output [B, N, D] or [B, D, H, W] is the content that P is added to: the last
            of the patch embedding. None: unknown.
        writers: every map whose output is added to the residual stream, beside the attentions' output layers:
            that of the patch embedding, the second layer of each MLP. None: unknown.
        between: norms and LayerScales between a writer and the stream.
        image_shape: says (C, H, W) of an image that makes a grid; None: unknown.
        whole_grid: a context in which `root` drops and masks no token (masked autoencoders).
        patch_of_guessed_grid: (height, width) of a patch in pixels where the grid is a guess, or None.
        position_is_given: P came from the caller, and need not be a part of the model.
        prefix_is_unknown: nobody said how many class and register tokens there are; a forward pass shows it,
            and `unknown_prefix` keeps it.
        placed: what the last call did with P: "new", it was replaced; "subspace", it was kept, and V is its
            row space; "keep".
    """

    position: Slot | None = None
    prefix: Sequence[Slot] = ()
    prefix_position: Slot | None = None
    entry: nn.Module | None = None
    content: Any = None
    writers: Sequence[LinearWeights] | None = None
    between: Sequence[nn.Module] = ()
    image_shape: Callable[[tuple[int, int]], tuple[int, int, int]] | None = None
    whole_grid: Callable[[], AbstractContextManager] = nullcontext
    patch_of_guessed_grid: tuple[int, int] | None = None
    position_is_given: bool = False
    prefix_is_unknown: bool = False
    unknown_prefix: int = 0
    placed: str | None = None
    notes: list[str] = field(default_factory=list)

    takes_alpha: ClassVar[bool] = False

    def init_(self, request: Request, layers: Sequence[int], offsets: Tensor) -> list[LayerRecord]:
        self.check_in_use()
        self._check_finite()
        self._check_sizes(request)
        if request.alpha is not None and not self.takes_alpha:
            raise ValueError(
                f"alpha must be None for {type(self.root).__name__}: convinit's own models have it"
            )
        chosen: dict[int, SelfAttention] = {i: self.attentions[i] for i in layers}
        self._check_unshared(chosen)
        dealt = dict(
            zip(chosen, offsets.split([attention.num_heads for attention in chosen.values()]), strict=True)
        )
        live = {i: attention for i, attention in chosen.items() if not attention.frozen}
        notes: dict[int, list[str | None]] = {i: [] for i in chosen}
        return self._init_(request, chosen, live, dealt, notes)

    def _init_(
        self,
        request: Request,
        chosen: Mapping[int, SelfAttention],
        live: Mapping[int, SelfAttention],
        dealt: Mapping[int, Tensor],
        notes: dict[int, list[str | None]],
    ) -> list[LayerRecord]:
        seed = request.draw_seed()  # whether P is replaced or kept, all other draws are the same
        subspace = self._uses_subspace(request)
        images = self._images(request, needed=subspace)
        V = self._separate_position_(request, images, seed) if subspace else None
        if V is None:
            self.placed = None if self.takes_alpha and self.content is None else "keep"
            self._check_differs(request)
            self.scale_(request)
        for i, attention in chosen.items():
            if i in live and request.values == "mimetic":
                notes[i].append(attention.set_values_(request.generator))
            elif i not in live:
                notes[i].append("queries and keys are frozen: left alone")
        if V is not None:
            self._separate_writers_(V)
        plans: dict[int, Plan] = {}
        if request.draws:
            for attention in live.values():
                attention.share = None
                attention.draw_qk_(request)
        elif request.fits:
            for attention in live.values():
                attention.share = None
            if V is None:
                tokens, prefix = self.tokens()
                groups = _alike(live, lambda attention: attention.see(tokens))
            else:
                alone, prefix = self._position_alone(V).float(), 0
                groups = _alike(live, lambda attention: alone)
            for P, group in groups:
                members = {i: live[i] for i in group}
                plans |= self._fitted(request, members, P, prefix, dealt, notes, subspace=V is not None)
            for i, plan in plans.items():
                live[i].set_qk_(*plan.weights, plan.offsets)
        seen = self._measure_(request, chosen, plans, images, V)
        for i, what in seen.items():
            if what.gain is None:
                continue
            if not live[i].has_qk_norm:
                live[i].share = 1 / what.gain
            elif qk_norm_weights(live[i]):
                notes[i].append(f"qk_norm: weight of its norms set to {what.gain:.2f}")
            else:
                notes[i].append(
                    "qk_norm has no weight, or it is frozen: how sharp the map is cannot be chosen"
                )
        return [self._record(i, chosen[i], plans.get(i), seen.get(i), request, notes[i]) for i in chosen]

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
            rows = self.prefix_position.read()
            prefix[: len(rows)] += rows
        if self.unknown_prefix:
            prefix = P.new_zeros(self.unknown_prefix, P.shape[1])
        return apply_norm(self.entry, torch.cat([prefix, P])), len(prefix)

    def slots(self) -> Iterator[tuple[str, Slot]]:
        yield from super().slots()
        parts = [self.position, *self.prefix, self.prefix_position]
        if not self.position_is_given:
            yield from (("its position embedding", slot) for slot in parts if slot is not None)
        for writer in self.writers or ():
            yield from (
                ("what writes to its tokens", slot)
                for slot in (writer.weight, writer.bias)
                if slot is not None
            )

    # --- P in a subspace of its own -----------------------------------------------------------------------

    def _uses_subspace(self, request: Request) -> bool:
        """Whether P gets a subspace of its own; ValueError where that was asked for and cannot be."""
        if request.position not in ("subspace", "new"):
            return False
        name = type(self.root).__name__
        outputs = [attention.output or attention.value for attention in self.attentions]
        frozen = [
            self._name(writer.weight.tensor)
            for writer in (*(self.writers or ()), *outputs)
            if writer is not None and (writer.frozen or (writer.bias is not None and writer.bias.frozen))
        ]
        frozen += [self._name(slot.tensor) for slot in self.prefix if slot.frozen and slot.read().any()]
        if self.writers is None:
            raise ValueError(
                f'position must be "keep" for {name}: not all layers that write to its tokens are known'
            )
        if frozen or not self.own_position:
            why = f"{frozen[0]} is frozen" if frozen else "it is no parameter or buffer of the model"
            if request.position_was_given:
                raise ValueError(f'position must be "keep" for {name}: {why}')
            self.notes.append(f"position embedding kept as it is: {why}")
            return False
        modules = list(self.root.modules())
        behind = modules[modules.index(self.content) :] if self.content in modules else []
        for module in behind[len(list(self.content.modules())) if self.content is not None else 0 :]:
            if isinstance(module, _BatchNorm):
                raise ValueError(
                    f'position must be "keep" for {name}: in training {type(module).__name__} divides each '
                    "channel by its own spread, which turns the content into P's subspace"
                )
        norms = [self.entry, *(attention.norm for attention in self.attentions), *self.between]
        for norm in norms:
            if not _uniform(norm):
                raise ValueError(
                    f"model must not be trained yet, but {self._name(norm)} of {name} seems trained: its "
                    'entries differ. Give a model that was just made; or give position="keep", which leaves '
                    "the position embedding as it is and overwrites the attentions"
                )
        return True

    def _separate_position_(
        self, request: Request, images: tuple[nn.Module, Any] | None, seed: int
    ) -> Tensor:
        """Gives P its subspace V [D, k]; P is replaced where it is as drawn."""
        assert self.position is not None
        P, dtype = self.position.read(), self.position.tensor.dtype
        self.placed = "subspace"
        constant = bool((P == P[0]).all())
        drawn = constant or (not self.position.frozen and looks_drawn(P, self.grid_size, dtype))
        if drawn or request.position == "new":
            self.placed = "new"
            if not self._is_saved():
                raise ValueError(
                    f"position embedding of {type(self.root).__name__} must be in its state_dict, or a new "
                    "one would be lost with the weights: make it a parameter or a persistent buffer, or give "
                    'position="keep"'
                )
            size = float((P - P.mean(dim=0)).square().mean().sqrt()) or POSITION_TO_CONTENT
            if self.content is not None and images is not None:
                with self.whole_grid():
                    content = output_of(self.content, *images).detach().float().cpu()
                channels = 1 if content.dim() == 4 else -1
                content = content - content.mean(dim=channels, keepdim=True)
                size = float(content.square().mean().sqrt())
                if request.values == "mimetic":
                    size = max(size, MIMETIC_CONTENT)
                size *= POSITION_TO_CONTENT
            if constant and self.position.frozen:
                self.notes.append("the position embedding was the same for all tokens: filled")
            generator = torch.Generator().manual_seed(seed)
            rank = min(attention.head_dim for attention in self.attentions)
            self.position.write_(size * smooth_position(self.grid_size, P.shape[1], rank, generator))
        V = row_space(self.position.read(), dtype)
        if V.shape[1] > MOST_OF_WIDTH * V.shape[0]:
            raise ValueError(
                f"position embedding must leave room for the content, but that of {type(self.root).__name__} "
                f"spans {V.shape[1]} of {V.shape[0]} dimensions and looks trained or made, so it is not "
                'replaced unasked: position="new" replaces it, "keep" fits queries and keys to it as it is'
            )
        return V

    def _separate_writers_(self, V: Tensor) -> None:
        for slot in (*self.prefix, self.prefix_position):
            if slot is not None:
                separate_(slot, V, rows=True)
        outputs = [attention.output or attention.value for attention in self.attentions]
        for writer in (*(self.writers or ()), *outputs):
            if writer is not None:
                separate_writer_(writer, V)

    def _position_alone(self, V: Tensor) -> Tensor:
        """P as norms show it where there is no content: V Vᵀ-part, rows of rms 1, [N, D]."""
        assert self.position is not None
        inside = self.position.read().double() @ V
        inside = inside / inside.norm(dim=1, keepdim=True) * math.sqrt(len(V))
        return inside @ V.mT

    def _images(self, request: Request, *, needed: bool) -> tuple[nn.Module, Any] | None:
        """The model and the images to run it on: the caller's, or synthetic ones; None: neither."""
        if request.images is not None:
            return request.model, request.images
        if self.image_shape is None:
            if needed:
                raise ValueError(
                    f"images must be given for {type(self.root).__name__}: init_vit_(model, images=batch), a "
                    "batch as the model takes it, for convinit does not know what that is"
                )
            return None
        channels, *size = self.image_shape(self.grid_size)
        images = synthetic_images(channels, (size[0], size[1]), math.prod(self.grid_size))
        like = next(p for p in self.root.parameters() if p.is_floating_point())
        return self.root, images.to(like.device, like.dtype)

    def _measure_(
        self,
        request: Request,
        chosen: Mapping[int, SelfAttention],
        plans: Mapping[int, Plan],
        images: tuple[nn.Module, Any] | None,
        V: Tensor | None,
    ) -> Mapping[int, Seen]:
        """Sets the sharpness of the layers' maps by what they see of images, and measures them."""
        if images is None or not plans:
            return {}
        alone = None if V is None else (V, self._position_alone(V) @ V)
        prefix = None if self.prefix_is_unknown else self.num_tokens(0) - math.prod(self.grid_size)
        with self.whole_grid():
            seen = calibrate_(
                chosen, plans, *images, position=alone, grid_size=self.grid_size, prefix=prefix,
                shared=request.shared,
            )  # fmt: skip
        tokens = {each.tokens for each in seen.values()} - {0}
        if self.prefix_is_unknown and tokens:
            self.unknown_prefix = max(tokens) - math.prod(self.grid_size)
        for count in tokens - {self.num_tokens(0)}:
            what = (
                f"the layers saw {count} tokens in place of {self.num_tokens(0)} (images of another size, or "
                "tokens dropped or masked)"
            )
            if V is not None:
                raise ValueError(f"images must show the model its own grid, but {what}")
            self.notes.append(f"peak on images: not measured, for {what}")
        return seen

    def _record(
        self,
        i: int,
        attention: SelfAttention,
        plan: Plan | None,
        seen: Seen | None,
        request: Request,
        notes: Sequence[str | None],
    ) -> LayerRecord:
        wq, wk = attention.qk_weights()
        norm = (wq.double().norm(dim=(1, 2)) * wk.double().norm(dim=(1, 2))).sqrt()
        targets = None if plan is None else plan.targets
        offsets = None if plan is None else plan.offsets
        record = self.record(i, targets, offsets, norm, "; ".join(filter(None, notes)))
        if seen is not None:
            record.share = seen.share
            if seen.figures is not None:
                record.peak_on_images = seen.figures["peak"]
                record.prefix_on_images = seen.figures["prefix"]
        if plan is not None and plan.aim is None:
            record.asked_peak = request.target_peak
        return record

    # --- P as it is, or enlarged --------------------------------------------------------------------------

    def scale_(self, request: Request) -> None:
        """A gain of P, into the weights."""
        assert self.position is not None
        if request.pos_embed_gain is None:
            return
        self._check_saved()
        _rescale_(self.root, "position", [self.position], request.pos_embed_gain)

    def _is_saved(self) -> bool:
        assert self.position is not None
        memory = memory_of(self.position.tensor)
        saved = self.root.state_dict(keep_vars=True).values()
        return any(isinstance(x, Tensor) and memory == memory_of(x) for x in saved)

    def _check_saved(self) -> None:
        """A P that is to be changed must be the model's own, and saved with it."""
        if self._is_saved():
            return
        if not self.own_position:
            raise ValueError(
                "pos_embed must be a parameter or buffer of the model, or a view of one, where it is to be "
                "scaled: scaling a copy would not reach the model"
            )
        warnings.warn(
            f"the position embedding of {type(self.root).__name__} is not in its state_dict. Before these "
            "weights are loaded into a new model, scale its P too: "
            'init_vit_(new, method="default", values="default", pos_embed_gain=...)',
            stacklevel=8,
        )

    # --- queries and keys ---------------------------------------------------------------------------------

    def _fitted(
        self,
        request: Request,
        members: Mapping[int, SelfAttention],
        seen: Tensor,
        prefix: int,
        dealt: Mapping[int, Tensor],
        notes: Mapping[int, list[str | None]],
        *,
        subspace: bool,
    ) -> dict[int, Plan]:
        """Weights of layers that see the same P, seen [n + N, D], from one fit."""
        first = next(iter(members.values()))
        heads = [attention.num_heads for attention in members.values()]
        P = _without(seen[prefix:], seen[:prefix])
        offsets = torch.cat([dealt[i] for i in members])
        # A LayerNorm of queries takes off their mean over r: one direction less, and none of it is wasted.
        rank = first.head_dim - first.has_qk_norm
        wq, wk, targets, fit = fitted_qk(
            request, P, offsets, self.grid_size, rank, scale=first.scale, num_heads=heads[0],
            generator=request.generator,
            unequal_tokens=subspace and not first.has_qk_norm,  # which makes keys equal again
            class_tokens=bool(self.prefix) or self.prefix_is_unknown,
        )  # fmt: skip
        aim = None if fit is None else self._parts(first, heads, fit.wq, fit.wk, fit.targets, fit.peak)
        own = self._parts(first, heads, wq, wk, targets)
        plans = {}
        for j, (i, attention) in enumerate(members.items()):
            plan = Plan(
                (own[0][j], own[1][j]), own[2][j], None if request.method == "scrambled" else dealt[i]
            )
            if aim is not None and request.weight_norm is None:
                if request.method in ("norm_matched", "scrambled"):
                    plan.aim = aim[0][j], aim[1][j], aim[2][j]
                plan.goal = min(request.target_peak or 1.0, float(aim[3][j].nanmean()))
                if attention.has_qk_norm and not subspace and request.target_peak is not None:
                    # The weights' norm is divided out there, so that of the norms is what the controls share.
                    attention.set_qk_(aim[0][j], aim[1][j], dealt[i])
                    note = _set_temperature_(attention, self.tokens()[0], aim[2][j], request.target_peak)
                    notes[i].append(note)
            plans[i] = plan
        return plans

    @staticmethod
    def _parts(
        first: SelfAttention, heads: list[int], wq: Tensor, wk: Tensor, *others: Tensor
    ) -> tuple[Sequence[Tensor], ...]:
        """wq, wk [heads, D, r] and others of each layer; with qk_norm queries and keys of sum zero."""
        if first.has_qk_norm:
            centred = _zero_mean_basis(first.head_dim).to(wq)
            wq, wk = wq @ centred, wk @ centred
        return tuple(each.split(heads) for each in (wq, wk, *others))

    # --- checks -------------------------------------------------------------------------------------------

    def _check_differs(self, request: Request) -> None:
        assert self.position is not None
        P = self.position.read()
        if request.fits and (P == P[0]).all():
            raise ValueError(
                "model must have a position embedding that differs between tokens, but that of "
                f'{type(self.root).__name__} is the same everywhere; position="new" fills it'
            )
        size = float(P.square().mean().sqrt()) * (request.pos_embed_gain or 1)
        unknown = self.prefix_is_unknown and all(attention.norm is None for attention in self.attentions)
        if request.fits and unknown and size < SMALLEST_POSITION:
            raise ValueError(
                f"pos_embed must be as large as attention sees it, but its rms is {size:.2g}, for which "
                "queries and keys would need weights of 100 and more. A norm in front of the attention would "
                "enlarge it, and nothing says whether there is one; without position= and pos_embed_gain= "
                "that does not matter"
            )

    def _check_sizes(self, request: Request) -> None:
        assert self.position is not None
        name, dim = type(self.root).__name__, self.position.read().shape[1]
        if math.prod(self.grid_size) < 2 and not (request.draws or request.method == "default"):
            raise ValueError(
                f"model must have two tokens or more on its grid for method={request.method!r}, but "
                f"{name} has one: its images are one patch"
            )
        widest = max(attention.head_dim for attention in self.attentions)
        if request.fits and widest > dim:
            raise ValueError(
                f"model must have heads no wider than its tokens for method={request.method!r}, but those of "
                f"{name} have {widest} dimensions (dim_head, head_dim) and its tokens {dim}"
            )

    def _check_finite(self) -> None:
        norms = {id(a.norm): a.norm for a in self.attentions if a.norm is not None}
        tensors = [
            slot.tensor for slot in (self.position, *self.prefix, self.prefix_position) if slot is not None
        ]
        tensors += [tensor for norm in (*norms.values(), self.entry) if norm for tensor in norm.parameters()]
        for tensor in tensors:
            if not bool(Slot(tensor).read().isfinite().all()):
                raise ValueError(
                    f"model must be finite, but {self._name(tensor)} holds NaN or infinite numbers"
                )

    @staticmethod
    def _check_unshared(chosen: Mapping[int, SelfAttention]) -> None:
        owners: dict[tuple, int] = {}
        for i, attention in chosen.items():
            slot = attention.query.weight
            other = owners.setdefault((id(slot.tensor), str(slot.index)), i)
            if other != i:
                raise ValueError(
                    f"model must have queries and keys of its own in each layer, but layers {other} and {i} "
                    f"share those of {chosen[other].name}; give layers= with one of them"
                )

    @property
    def own_position(self) -> bool:
        """Whether P is a parameter or buffer of the model, or an attribute of it, or a view of one."""
        assert self.position is not None
        kept = (*self.root.parameters(), *self.root.buffers(), *vars(self.root).values())
        memory = memory_of(self.position.tensor)
        return any(isinstance(tensor, Tensor) and memory == memory_of(tensor) for tensor in kept)

    def _name(self, part: Any) -> str:
        named = (*self.root.named_parameters(), *self.root.named_buffers(), *self.root.named_modules())
        return next((name for name, each in named if each is part), "a part")

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Puts all that may be written back as it was if an error stops it half-way."""
        parts = (self.position, *self.prefix, self.prefix_position)
        tensors = {id(slot.tensor): slot.tensor for slot in parts if slot is not None}
        tensors |= {id(slot.tensor): slot.tensor for _, slot in self.slots()}
        for attention in self.attentions:
            tensors |= {id(slot.tensor): slot.tensor for slot in qk_norm_weights(attention) or ()}
        before = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        try:
            yield
        except BaseException:
            for key, tensor in tensors.items():
                tensor.detach().copy_(before[key])
            raise


def mlp_output(mlp: nn.Module) -> LinearWeights:
    """The last linear layer of an MLP, gated or not: the one that writes to the residual stream."""
    return LinearWeights.of([layer for layer in mlp.modules() if isinstance(layer, nn.Linear)][-1])


def _uniform(norm: nn.Module | None) -> bool:
    """Whether all entries of each parameter of a norm or LayerScale are the same, as libraries draw them."""
    parameters = () if norm is None else norm.parameters()
    return all(
        bool((values == values.flatten()[0]).all())
        for p in parameters
        if (values := Slot(p).read()) is not None
    )


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
            Slot(weight).write_(torch.full_like(Slot(weight).read(), gain))
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


def _alike(
    live: Mapping[int, SelfAttention], see: Callable[[SelfAttention], Tensor]
) -> list[tuple[Tensor, list[int]]]:
    """What layers see of P, and groups of layers that one fit serves: the same tokens, rank and scale."""
    groups: list[tuple[tuple, Tensor, list[int]]] = []
    for i, attention in live.items():
        key, seen = (attention.head_dim, attention.scale, attention.has_qk_norm), see(attention)
        for other_key, other, group in groups:
            if key == other_key and torch.equal(seen, other):
                group.append(i)
                break
        else:
            groups.append((key, seen, [i]))
    return [(seen, group) for _, seen, group in groups]


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


def _rescale_(root: nn.Module, key: str, slots: Sequence[Slot], factor: float) -> None:
    """Multiplies by `factor`, once: what an earlier call did is undone first, unless values changed since.

    Other values in the same shape were drawn or loaded; those of another shape are the same P, resampled.
    """
    record = root.__dict__.setdefault("_convinit_scales", {})

    def size() -> float:
        return math.sqrt(sum(float(slot.read().double().square().sum()) for slot in slots))

    shapes = [slot.read().shape for slot in slots]
    earlier, left, of = record.get(key, (1.0, 0.0, shapes))
    if of == shapes and abs(size() - left) > 1e-3 * left:
        earlier = 1.0
    if factor != earlier:
        for slot in slots:
            slot.write_(slot.read() * (factor / earlier))
    record[key] = (factor, size(), shapes)
