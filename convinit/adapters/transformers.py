"""Entry point for users of Hugging Face transformers: convinit's attention as an implementation of theirs.

How convinit sees the library's models is in `transformers_vit` and `transformers_towers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convinit.ops.backends import check_backend
from convinit.ops.positional_attention import positional_attention

__all__ = ["register_attention"]

# What some models of transformers also give to their attention, and what would change its result.
_REFUSED = ("cache", "position_bias", "s_aux", "sliding_window", "softcap")


def register_attention(name: str = "convinit", *, backend: str = "auto") -> str:
    """Makes :func:`convinit.positional_attention` an attention implementation of transformers.

    softmax(scaling · q kᵀ) v

    Call it once; then ``model.set_attn_implementation("convinit")``, or ``attn_implementation="convinit"``
    where a model is made. Weights and results stay as they are.

    It is for encoders in which every token sees all others, such as ViT, DeiT and ViTMAE. What it cannot do
    raises a ValueError in the forward pass and never falls back: a mask that hides tokens, causal attention,
    fewer keys than queries, and attention weights to be returned (output_attentions; "eager" returns them).

    Args:
        name: under which transformers knows it. The last registration of a name counts.
        backend: "auto", "triton", "native", "sdpa" or "eager", as in
            :func:`convinit.positional_attention`.

    Returns:
        The name.

    Raises:
        ValueError: the backend is unknown, or the name is one of transformers' own.
        ImportError: transformers is missing, or older than 5.
    """
    check_backend(backend)
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            "register_attention needs transformers 5 or newer; get it with: pip install 'transformers>=5'"
        ) from error
    if name == "eager" or not isinstance(AttentionInterface().get(name), (_Attention, type(None))):
        raise ValueError(f"name must be new, but transformers has an attention implementation {name!r}")
    AttentionInterface.register(name, _Attention(name, backend))
    # Without a mask function under the same name transformers would drop every mask without a word. This one
    # makes a mask only where there is something to hide.
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


@dataclass(frozen=True)
class _Attention:
    """The attention that is registered."""

    name: str
    backend: str

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """query, key, value [B, heads, N, r] → [B, N, heads, r], and no attention weights."""
        if attention_mask is not None:
            self._refuse("attention_mask must be None or hide nothing", f"got {list(attention_mask.shape)}")
        # As transformers' own: an attention that does not say is that of a decoder.
        if getattr(module, "is_causal", True) if is_causal is None else is_causal:
            self._refuse("is_causal must be False", f"{type(module).__name__} is causal")
        config = getattr(module, "config", None)
        if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
            self._refuse("output_attentions must be False", "the attention weights are never made")
        for argument in _REFUSED:
            if kwargs.get(argument) is not None:
                self._refuse(f"{argument} must be None", f"{type(module).__name__} gives one")
        if torch.is_autocast_enabled(query.device.type):  # rotary embedding leaves float32 beside bfloat16
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        out = positional_attention(query, key, value, scale=scaling, dropout_p=dropout, backend=self.backend)
        return out.unflatten(-1, (query.shape[1], query.shape[3])), None

    def _refuse(self, expected: str, reason: str) -> None:
        raise ValueError(
            f"{expected} with the attention implementation {self.name!r}: {reason}; use "
            'model.set_attn_implementation("eager") or "sdpa" for this model'
        )
