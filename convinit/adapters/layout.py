"""What an adapter says of a model: where its position embedding and its self-attentions are.

An adapter is one file with one function, ``adapt(module, name)``, which returns a :class:`Layout` for a
module that it knows and None for any other. It describes; reading, fitting and writing are done here, in
the same way for every library: see `timm_vit.py` for an example.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convinit import init as init_
from convinit.records import LayerRecord, measured, no_metrics

if TYPE_CHECKING:
    from convinit.adapters.request import Request


UNKNOWN_GRID = (0, 0)  # of a model that does not say; the caller of init_vit_ has to


@dataclass(frozen=True, eq=False)
class Slot:
    """A part of a parameter or buffer, by index: read as a whole tensor on the CPU, written in place.

    Sharded tensors (DTensor: FSDP2, tensor parallelism) are gathered to read, and every rank writes its own
    shard; all ranks must come along.

    Attributes:
        tensor: the parameter or buffer.
        index: whatever indexes a tensor; () is all of it.
    """

    tensor: Any
    index: Any = ()

    @property
    def frozen(self) -> bool:
        """Whether it is a parameter that is not trained; buffers are not."""
        return isinstance(self.tensor, nn.Parameter) and not self.tensor.requires_grad

    @torch.no_grad()
    def read(self) -> Tensor:
        """A copy on the CPU, in float32 or wider."""
        whole = whole_tensor(self.tensor)[self.index]
        return whole.to("cpu", torch.promote_types(whole.dtype, torch.float32), copy=True)

    @torch.no_grad()
    def write_(self, values: Tensor) -> None:
        """Puts `values` there, cast to the tensor's own dtype."""
        if not is_sharded(self.tensor):
            self.tensor[self.index] = values.to(self.tensor)
            return
        from torch.distributed.tensor import distribute_tensor

        whole = self.tensor.full_tensor()
        whole[self.index] = values.to(whole)
        # src_data_rank=None: every rank cuts its shard from its own copy; all copies are the same.
        mine = distribute_tensor(whole, self.tensor.device_mesh, self.tensor.placements, src_data_rank=None)
        self.tensor.to_local().copy_(mine.to_local())


def whole_tensor(tensor: Any) -> Tensor:
    """The tensor without its sharding and its graph."""
    tensor = tensor.detach()
    if tensor.is_meta:
        raise ValueError(
            "model must hold real tensors, but some are on the meta device; call model.to_empty(device=...) "
            "and the model's own initialisation first, then init_vit_"
        )
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def memory_of(tensor: Tensor) -> int:
    """The storage that a tensor, perhaps a view, lies in."""
    return id(tensor) if is_sharded(tensor) or tensor.is_meta else tensor.untyped_storage().data_ptr()


def reshard_(model: nn.Module) -> None:
    """Lets FSDP2 drop the gathered parameters that a forward pass leaves in the outermost module."""
    module: Any = sys.modules.get("torch.distributed.fsdp")
    for part in model.modules() if module is not None else ():
        if isinstance(part, module.FSDPModule):
            part.reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; there is none before that part of PyTorch, slow to import, was imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@dataclass(frozen=True, eq=False)
class LinearWeights:
    """One linear map of a model: all of an ``nn.Linear``, or some rows of a packed one.

    Attributes:
        weight: [out, in].
        bias: [out], or None.
    """

    weight: Slot
    bias: Slot | None = None

    @classmethod
    def of(cls, layer: Any, rows: slice | None = None) -> LinearWeights:
        """Rows of an ``nn.Linear`` or convolution: layers that multiply with their weight and do no more.

        Raises:
            ValueError: it is another layer, such as a low-rank adapter or a quantised one, whose output
                depends on more than `weight` and `bias`.
        """
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            raise ValueError(
                f"model must have nn.Linear layers where convinit sets weights, got "
                f"{type(layer).__name__} of {type(layer).__module__}, whose output "
                "depends on more than its weight; call init_vit_ before such layers are put in"
            )
        index = () if rows is None else rows
        bias = getattr(layer, "bias", None)
        return cls(Slot(layer.weight, index), None if bias is None else Slot(bias, index))

    def set_(self, weight: Tensor) -> None:
        """The weight, and a bias of zero."""
        self.weight.write_(weight)
        if self.bias is not None and not self.bias.frozen:
            self.bias.write_(torch.zeros_like(self.bias.read()))

    @property
    def frozen(self) -> bool:
        return self.weight.frozen


def packed_qkv(layer: Any, inner: int) -> tuple[LinearWeights, LinearWeights, LinearWeights]:
    """Queries, keys and values of one [3·inner, D] product."""
    query, key, value = (LinearWeights.of(layer, slice(i * inner, (i + 1) * inner)) for i in range(3))
    return query, key, value


@dataclass(eq=False)
class SelfAttention:
    """One self-attention over a token grid.

    Attributes:
        name: as in ``model.named_modules()``.
        reads: the module whose first input [B, T, D] the queries and keys are made from. T is N patch tokens
            behind any class and register tokens.
        num_heads, head_dim, scale: of softmax(scale · q kᵀ).
        query, key: [heads·r, D].
        value, output: [heads·r, D] and [D, heads·r]; None where the model has none.
        norm: what tokens go through before `reads`: the layer's LayerNorm, or None.
        query_norm, key_norm: over the r numbers of each query and key, where the model has them (qk_norm).
        batch_first: False where the input of `reads` is [T, B, D].
        share: of P in the norm of the tokens that the layer sees, which its queries and keys were made for;
            None: they were made for P alone.
    """

    name: str
    reads: nn.Module
    num_heads: int
    head_dim: int
    scale: float
    query: LinearWeights
    key: LinearWeights
    value: LinearWeights | None = None
    output: LinearWeights | None = None
    norm: nn.Module | None = None
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None
    batch_first: bool = True
    share: float | None = None

    @property
    def frozen(self) -> bool:
        return self.query.frozen or self.key.frozen

    @property
    def has_qk_norm(self) -> bool:
        return self.query_norm is not None

    def see(self, tokens: Tensor) -> Tensor:
        """Tokens [T, D] of the residual stream as the queries and keys see them, [T, D]."""
        return apply_norm(self.norm, tokens)

    def qk_weights(self) -> tuple[Tensor, Tensor]:
        """wq, wk [heads, D, r] as they are now: copies on the CPU."""
        wq, wk = (
            linear.weight.read().unflatten(0, (self.num_heads, self.head_dim)).mT
            for linear in (self.query, self.key)
        )
        return wq, wk

    def set_qk_(self, wq: Tensor, wk: Tensor, offsets: Tensor | None) -> None:
        """Takes wq, wk [heads, D, r]; biases become 0. `offsets` is for models that keep them."""
        self._write_qk_(wq, wk)

    def _write_qk_(self, wq: Tensor, wk: Tensor) -> None:
        """Takes what `qk_weights` gives; biases become 0."""
        self.query.set_(wq.mT.flatten(0, 1))
        self.key.set_(wk.mT.flatten(0, 1))

    def draw_qk_(self, request: Request) -> None:
        """Mimetic or random queries and keys, biases 0."""
        wq, wk = self.qk_weights()
        if request.method == "mimetic":
            init_.mimetic_qk_(wq, wk, distribution=request.distribution, generator=request.generator)
        else:
            init_.random_qk_(wq, wk, generator=request.generator)
        self._write_qk_(wq, wk)

    def set_values_(self, generator: torch.Generator | None) -> str | None:
        """Mimetic values and output layer, biases 0; a note where that cannot be."""
        if self.value is None or self.output is None:
            return "no value or output layer: values kept"
        if self.value.frozen or self.output.frozen:
            return "values frozen: kept"
        wv, wo = self.value.weight.read().mT, self.output.weight.read().mT
        init_.mimetic_vo_(wv, wo, generator=generator)
        self.value.set_(wv.mT)
        self.output.set_(wo.mT)
        return None

    def queries_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, D], the input of `reads` -> queries and keys [B, heads, T, r] in float32."""
        parts = []
        for linear, norm in ((self.query, self.query_norm), (self.key, self.key_norm)):
            bias = None if linear.bias is None else linear.bias.read().to(x.device)
            weight = linear.weight.read().to(x.device)
            part = nn.functional.linear(x.to(weight.dtype), weight, bias)
            part = part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            parts.append(apply_norm(norm, part))
        return parts[0], parts[1]

    @torch.no_grad()
    def attention_map(self, x: Tensor) -> Tensor:
        """softmax(scale · q kᵀ) [B, heads, T, T] of x [B, T, D], the input of `reads`."""
        q, k = self.queries_keys(x)
        return (self.scale * q @ k.mT).softmax(dim=-1)

    def position_map(self, tokens: Tensor) -> Tensor:
        """The map [heads, T, T] of the positions alone: tokens [T, D] without any content.

        A norm would enlarge them to the size of whole tokens; `share` undoes that. Where no norm is known, it
        is the rms of P among the tokens.
        """
        seen = self.see(tokens)
        if self.share is not None:
            seen = self.share * (
                seen if self.norm is not None else nn.functional.layer_norm(seen, seen.shape[1:])
            )
        return self.attention_map(seen.unsqueeze(0))[0]


@torch.no_grad()
def apply_norm(norm: nn.Module | None, x: Tensor) -> Tensor:
    """norm(x) at the device and precision of x, whatever those of the norm's own parameters."""
    if norm is None:
        return x
    own = {
        name: whole_tensor(tensor).to(x) for name, tensor in (*norm.named_parameters(), *norm.named_buffers())
    }
    return torch.func.functional_call(norm, own, (x,))


@dataclass(eq=False)
class Layout(ABC):
    """A model, or a part of one, with its attentions; subclasses say how positions reach the maps.

    Attributes:
        name: of the module, as in ``model.named_modules()``; "" for the model itself.
        root: the module.
        grid_size: (H, W) of the patch tokens, or UNKNOWN_GRID.
        attentions: in the order of the layers.
    """

    name: str
    root: nn.Module
    grid_size: tuple[int, int]
    attentions: Sequence[Any] = field(default_factory=list)

    @abstractmethod
    def init_(self, request: Request, layers: Sequence[int], offsets: Tensor) -> list[LayerRecord]:
        """Sets the chosen layers, whose heads together have `offsets` [heads, 2]; a record for each layer."""

    @abstractmethod
    def position_maps(self, layer: int) -> Tensor:
        """What the positions alone make of a layer's attention, [heads, T, T]."""

    def check_in_use(self) -> None:
        """All that is read and written must be the model's own now: parametrizations, pruning, sharding and
        `set_input_size` put other tensors in its place."""
        own = {*map(memory_of, (*self.root.parameters(), *self.root.buffers()))}
        own |= {memory_of(tensor) for tensor in vars(self.root).values() if isinstance(tensor, Tensor)}
        for owner, slot in self.slots():
            if memory_of(slot.tensor) not in own:
                raise ValueError(
                    f"model must hold {owner} in parameters or buffers of its own, but it has got "
                    "other tensors since, or another module computes them (parametrizations, weight_norm, "
                    "pruning); take that off, or shard and resize the model, before init_vit_"
                )

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """The tensors that its attentions are made of, with the name of their attention."""
        for attention in self.attentions:
            for each in fields(attention):
                part = getattr(attention, each.name)
                parts = (part.weight, part.bias) if isinstance(part, LinearWeights) else (part,)
                yield from (
                    (attention.name or "its attention", slot) for slot in parts if isinstance(slot, Slot)
                )

    def grid_of(self, layer: int) -> tuple[int, int]:
        """(H, W) of the patch tokens that a layer's maps are over."""
        return self.grid_size

    def record(
        self,
        layer: int,
        targets: Tensor | None,
        offsets: Tensor | None,
        weight_norm: Tensor,
        note: str | None,
    ) -> LayerRecord:
        """The metrics of a layer as it is now; without targets [heads, N] there are none but the norm."""
        heads = len(weight_norm)
        metrics = no_metrics(heads) if targets is None else measured(self.position_maps(layer), targets)
        offsets = None if targets is None else offsets
        name = self.attentions[layer].name
        record = LayerRecord(layer, name, offsets, targets, **metrics, weight_norm=weight_norm)  # type: ignore[arg-type]
        record.note = note or ""
        return record

    def num_tokens(self, layer: int) -> int:
        """T, the number of tokens that a layer sees, class and register tokens included."""
        height, width = self.grid_of(layer)
        return height * width
