"""Multi-head attention whose maps start as random impulse convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convinit import init as init_
from convinit._checks import (
    check_choice,
    check_flag,
    check_grid_size,
    check_int,
    check_number,
    check_offsets,
    check_probability,
    check_same_device,
    check_share,
    check_tensor,
)
from convinit.fit import Adam
from convinit.fit.api import Solver
from convinit.init._shared import rounded
from convinit.init.options import InitOptions
from convinit.init.query_key import fitted_qk
from convinit.nn._linear import Linear
from convinit.nn.position import check_position, fill_position_
from convinit.ops.backends import BACKENDS
from convinit.ops.positional_attention import packed_attention, positional_attention
from convinit.ops.shared_attention import shared_attention

__all__ = ["ConvInitAttention", "reset_mixing_"]

VARIANTS = ("vanilla", "I", "II", "III")


class ConvInitAttention(nn.Module):
    """Self-attention over a token grid, initialised so that every head is an impulse convolution.

    ===========  ======================================================  ===================
    ``variant``  attention map                                           the map depends on
    ===========  ======================================================  ===================
    "vanilla"    softmax(scale · x W_q (x W_k)ᵀ)                         x
    "I"          the same with α x + (1−α) P for x                       x and P
    "II"         the same with P for x                                   P: one for a batch
    "III"        softmax(scale · Q K), free Q [N, r] and K [r, N]        one for a batch
    ===========  ======================================================  ===================

    out = concat_heads(map · x W_v) W_o. In the models x is LayerNorm(x), the norm being the block's.

    Args:
        dim: D, width of the tokens.
        num_heads: heads.
        grid_size: (H, W); the input must be these N = H·W tokens, row-major, without class token.
        head_dim: r; None means dim / num_heads.
        kernel_size: f, offsets are drawn from the f×f window; odd, and at most 2·min(H, W) − 1, so that every
            offset that is drawn for a fit leaves some token its target. None means half the grid, 3 to 7: 3
            on 8 × 8 tokens, 7 on 14 × 14.
        alpha: content share α of Model I, 0 to 1.
        variant: see the table.
        scale: softmax temperature, of the fit and of the forward pass; None means r**-0.5.
        qkv_bias: biases of the query, key and value projections.
        attn_drop, proj_drop: dropout on the attention weights (in Models II and III one mask for the batch)
            and on the output.
        value, proj: False leaves out W_v or W_o. Either needs heads·r = D.
        proj_bias: bias of the output layer.
        backend: of the attention: "auto", "triton", "native", "sdpa" or "eager", as in
            :func:`~convinit.ops.positional_attention.positional_attention` and
            :func:`~convinit.ops.shared_attention.shared_attention`. An explicit choice never falls back.
        trainable_mixing: False freezes W_q and W_k, or Q and K.
        padding_mode: of the impulse matrices: "zeros", "replicate", "circular", "reflect".
        method: what queries and keys start as. "impulse"; the papers' "mimetic" and "random"; "default", as
            ``nn.Linear``; the controls "scrambled" (fit to random permutations) and "norm_matched" (random),
            both at the weight norm that "impulse" would have had. Model III starts from Q = P W_q and
            K = (P W_k)ᵀ if those are fitted or norm-matched; the other methods, and ``fit="adam"``, are
            applied to Q and Kᵀ themselves, where "default" means "random".
        distribution: of the noise in "mimetic" queries and keys: "normal", of variance 1/D (arXiv
            2305.09828), or "uniform", of variance 1/(3D) (arXiv 2401.12511).
        values: of W_v and W_o: "mimetic", whose product is 0.4·Z − 0.4·I (arXiv 2305.09828), or "default", as
            ``nn.Linear``, which is also what one of them without the other is.
        offsets: [heads, 2], the (dy, dx) of every head. None deals them out so that every f² heads in a row
            cover the window once; "random" draws each by itself; "fixed" is the order of arXiv 2505.19985.
        fit, weight_norm, peak: of the impulses; see :func:`convinit.fit_qk`. The fit sees LayerNorm(P) in the
            vanilla variant, whose tokens come out of a norm, and P in Models II and III. In Model I "newton"
            sees (1−α) P, the positional part of its queries and keys, and the papers' fits see P, as theirs
            do. In Model III "adam" fits Q and K without P, as theirs does.
        pos_embed: P [N, D]; "sincos", the fixed 2-D sin-cos of grid and dim, which needs a D divisible by 4;
            or "identity", a unit vector a token, which needs N ≤ D. A given P is data: it is saved with the
            state_dict, and after ``to_empty`` it must be loaded.
        attn_head_dim, dim_out, qk_norm, scale_norm, gated, norm_layer: taken so that the module can stand in
            a timm block. ``attn_head_dim`` is timm's name of head_dim; norm_layer is not used, as in timm
            when there is no norm; what would change the fitted map or the output is refused.
        generator: CPU generator of the initial values; None means torch's own.
        device, dtype: of parameters and buffers.

    Shape: x [B, N, D] → [B, N, D].

    Buffers: ``pos_embed`` P [N, D]; ``offsets`` [heads, 2], the (dy, dx) of every head. They are drawn first,
    whatever the method, so that one seed pairs the controls with "impulse".

    Raises:
        ValueError, TypeError: an argument is out of range, or the input is not on this grid.

    Source: arXiv 2401.12511, Models I to III; its weights are those of ``fit="adam", scale=0.1,
    kernel_size=5, offsets="random", values="default"``. Two departures: the position term (1−α) P W is made
    once a step and not once an image, with the same result; and "newton" fits (1−α) P in Model I, so that
    ``peak`` is what the layer has on zero content; content softens it further.
    """

    pos_embed: Tensor
    offsets: Tensor
    qkv: nn.Linear | None
    qk: nn.Linear | None
    v: nn.Linear | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: Sequence[int],
        *,
        head_dim: int | None = None,
        kernel_size: int | None = None,
        alpha: float = 0.2,
        variant: str = "I",
        scale: float | None = None,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        value: bool = True,
        proj: bool = True,
        proj_bias: bool = True,
        backend: str = "auto",
        trainable_mixing: bool = True,
        padding_mode: str = "zeros",
        method: str = "impulse",
        distribution: str = "normal",
        values: str = "mimetic",
        fit: str | Solver = "newton",
        weight_norm: float | None = None,
        peak: float | None = None,
        offsets: Tensor | str | None = None,
        pos_embed: Tensor | str = "sincos",
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qk_norm: bool = False,
        scale_norm: bool = False,
        gated: bool = False,
        norm_layer: type[nn.Module] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _refuse_timm_options(dim, dim_out, qk_norm, scale_norm, gated)
        dim, num_heads = check_int("dim", dim), check_int("num_heads", num_heads)
        height, width = check_grid_size(grid_size)
        head_dim = _head_dim(dim, num_heads, head_dim if attn_head_dim is None else attn_head_dim)
        check_choice("variant", variant, VARIANTS)
        check_choice("backend", backend, BACKENDS)
        options = InitOptions(
            method=method, fit=fit, values=values, kernel_size=kernel_size, peak=peak,
            weight_norm=weight_norm, padding_mode=padding_mode, offsets=offsets, distribution=distribution,
        )  # fmt: skip
        if method == "position_only":
            raise ValueError(
                'method must not be position_only here: P does not depend on it, so "default" is that control'
            )
        if isinstance(offsets, Tensor):
            check_offsets(offsets, num_heads)
        flags = {"qkv_bias": qkv_bias, "value": value, "proj": proj, "proj_bias": proj_bias}
        for name, flag in (flags | {"trainable_mixing": trainable_mixing}).items():
            check_flag(name, flag)
        attn_drop, proj_drop = (
            check_probability("attn_drop", attn_drop),
            check_probability("proj_drop", proj_drop),
        )
        space, size = ("dim", dim)
        if variant == "III" and not options.fits:
            space, size = ("tokens of grid_size", height * width)
        if (options.fits or method == "mimetic") and head_dim > size:
            raise ValueError(
                f"head_dim must be at most {space} = {size} for method={method!r}, got {head_dim}"
            )
        alpha = check_share("alpha", alpha)
        if alpha == 1 and variant == "I" and options.fits:
            raise ValueError(
                f"alpha must be below 1 for method={method!r}: with 1 the maps do not see the position"
            )
        scale = head_dim**-0.5 if scale is None else check_number("scale", scale)
        if not (value and proj) and num_heads * head_dim != dim:
            raise ValueError(
                f"value and proj must both be True unless num_heads·head_dim = dim, got "
                f"{num_heads}·{head_dim} and dim = {dim}"
            )

        self.dim = dim
        self.num_heads = num_heads
        self.grid_size = (height, width)
        self.head_dim = head_dim
        self.kernel_size = options.window([self.grid_size])
        self.alpha = alpha
        self.variant = variant
        self.scale = scale
        self.attn_drop = attn_drop
        self.backend = backend
        self.init_options = options
        self.trainable_mixing = trainable_mixing

        device = torch.get_default_device() if device is None else torch.device(device)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        tokens, inner = height * width, num_heads * head_dim
        self.qkv = self.qk = self.v = None
        if variant in ("vanilla", "I") and value and trainable_mixing:
            self.qkv = nn.utils.skip_init(Linear, dim, 3 * inner, bias=qkv_bias, **factory)
        else:
            if variant != "III":
                self.qk = nn.utils.skip_init(Linear, dim, 2 * inner, bias=qkv_bias, **factory)
                self.qk.requires_grad_(trainable_mixing)
            if value:
                self.v = nn.utils.skip_init(Linear, dim, inner, bias=qkv_bias, **factory)
        if variant == "III":
            q_map, k_map = (
                torch.empty(num_heads, tokens, head_dim, **factory),
                torch.empty(num_heads, head_dim, tokens, **factory),
            )
            self.q_map = nn.Parameter(q_map, requires_grad=trainable_mixing)
            self.k_map = nn.Parameter(k_map, requires_grad=trainable_mixing)
        self.proj = (
            nn.utils.skip_init(Linear, inner, dim, bias=proj_bias, **factory) if proj else nn.Identity()
        )
        self.proj_drop = nn.Dropout(proj_drop)

        self._fixed = pos_embed if isinstance(pos_embed, str) else None
        if isinstance(pos_embed, str):
            check_position(pos_embed, self.grid_size, dim)  # refuses such a dim; `_fill_position` fills P
            pos_embed = torch.empty(tokens, dim, **factory)
        elif check_tensor("pos_embed", pos_embed, f"[{tokens}, {dim}]").shape != (tokens, dim):
            raise ValueError(f"pos_embed must be [{tokens}, {dim}], N and dim, got {list(pos_embed.shape)}")
        else:
            pos_embed = pos_embed.detach().to(device, dtype or torch.get_default_dtype(), copy=True)
        self.register_buffer("pos_embed", pos_embed, persistent=self._fixed is None)
        self.register_buffer("offsets", torch.empty(num_heads, 2, dtype=torch.int64, device=device))
        self.register_load_state_dict_post_hook(_fill_position)
        if not self.offsets.is_meta:
            self.reset_parameters(generator)

    # --- initial values -----------------------------------------------------------------------------------

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw offsets and all weights anew, as the constructor does. Works after ``to_empty``.

        Args:
            generator: CPU generator. The same seed gives the same module.
        """
        reset_mixing_([self], generator)
        self.reset_values(generator)

    @torch.no_grad()
    def reset_values(self, generator: torch.Generator | None = None) -> None:
        """The part of :meth:`reset_parameters` that leaves the maps alone: value and output layer."""
        inner = self.num_heads * self.head_dim
        parts: list[tuple[Tensor, Tensor | None]] = []  # weight and bias of W_v and W_o, where there are such
        layer = self.v if self.qkv is None else self.qkv
        if layer is not None:
            _check_own(self, layer)
            parts.append((layer.weight[-inner:], None if layer.bias is None else layer.bias[-inner:]))
        if isinstance(self.proj, nn.Linear):
            _check_own(self, self.proj)
            parts.append((self.proj.weight, self.proj.bias))
        mimetic = self.init_options.values == "mimetic" and len(parts) == 2
        if mimetic:
            (wv, _), (wo, _) = parts
            init_.mimetic_vo_(wv.mT, wo.mT, generator=generator)
        for weight, bias in parts:
            if not mimetic:
                init_.default_(weight, bias, generator=generator)
            elif bias is not None:
                bias.zero_()

    @torch.no_grad()
    def set_qk_(self, wq: Tensor, wk: Tensor, offsets: Tensor | None = None) -> ConvInitAttention:
        """Take over fitted query and key weights; their biases become 0.

        Model III keeps the maps' factors instead: Q = P wq, K = (P wk)ᵀ.

        Args:
            wq, wk: [heads, D, r], for example some heads of a :class:`~convinit.QKFit`.
            offsets: [heads, 2] of those heads; None leaves the buffer as it is.

        Returns:
            self.
        """
        expected = (self.num_heads, self.dim, self.head_dim)
        for name, weight in (("wq", wq), ("wk", wk)):
            check_tensor(name, weight, str(list(expected)))
        if wq.shape != expected or wk.shape != expected:
            raise ValueError(f"wq and wk must be {list(expected)}, got {list(wq.shape)} and {list(wk.shape)}")
        if offsets is not None:
            self.offsets.copy_(check_offsets(offsets, self.num_heads))
        if self.variant == "III":
            pos_embed = self.pos_embed.double()
            wq, wk = (pos_embed @ w.to(pos_embed) for w in (wq, wk))
        self._write_qk_(wq, wk)
        return self

    def _write_qk_(self, wq: Tensor, wk: Tensor) -> None:
        """Writes W_q and W_k, or Q and Kᵀ of Model III, and biases of 0."""
        layer_wq, layer_wk = self._layer_qk()
        new_wq, new_wk = rounded("wq", layer_wq, wq), rounded("wk", layer_wk, wk)
        layer_wq.copy_(new_wq)
        layer_wk.copy_(new_wk)
        bias = self._qk_bias()
        if bias is not None:
            bias.zero_()

    def _layer_qk(self) -> tuple[Tensor, Tensor]:
        """What the layer has of queries and keys, as views: W_q and W_k [heads, D, r], or Q and Kᵀ."""
        return (self.q_map, self.k_map.mT) if self.variant == "III" else self.qk_weights()

    def get_extra_state(self) -> Tensor:
        """What the state_dict keeps beside weights and buffers: alpha and scale, [2] float64."""
        return torch.tensor([self.alpha, self.scale], dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.alpha, self.scale = state.tolist()

    def _fill_position(self) -> None:
        """A fixed P is not saved, and ``to_empty`` leaves it blank."""
        if self._fixed is not None:
            fill_position_(self, self._fixed, self.grid_size, self.dim)

    def init_weights(self) -> None:
        """:meth:`reset_parameters` under the name that timm calls after it has drawn every ``nn.Linear``."""
        self.reset_parameters()

    @torch.no_grad()
    def _draw_qk(self, generator: torch.Generator | None) -> None:
        """Queries and keys of the methods that need no fit."""
        bias = self._qk_bias()
        if bias is not None:
            bias.zero_()
        wq, wk = self._layer_qk()
        options = self.init_options
        if options.method == "mimetic":
            init_.mimetic_qk_(wq, wk, distribution=options.distribution, generator=generator)
        elif options.method == "random" or self.variant == "III":
            init_.random_qk_(wq, wk, generator=generator)
        else:
            init_.default_(self._qk_weight(), bias, generator=generator)

    def qk_weights(self) -> tuple[Tensor, Tensor]:
        """W_q and W_k as views [heads, D, r] of the projection's weight. Model III has none."""
        weight = self._qk_weight().view(2, self.num_heads, self.head_dim, self.dim).mT
        return weight[0], weight[1]

    def _qk_weight(self) -> Tensor:
        layer = self.qk if self.qkv is None else self.qkv
        if layer is None:
            raise ValueError('variant "III" has no query and key weights: its parameters are q_map and k_map')
        _check_own(self, layer)
        return layer.weight[: 2 * self.num_heads * self.head_dim]

    def _qk_bias(self) -> Tensor | None:
        layer = self.qk if self.qkv is None else self.qkv
        if layer is None or layer.bias is None:
            return None
        return layer.bias[: 2 * self.num_heads * self.head_dim]

    # --- forward ------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, D] → [B, N, D]. The other two arguments are timm's and must keep their defaults."""
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask must be None and is_causal False: every token sees the whole grid")
        self._check_input(x)
        dropout_p = self.attn_drop if self.training else 0.0
        if self.variant in ("vanilla", "I"):
            alpha, q_pos, k_pos = self._position_term()
            options: dict[str, Any] = {"scale": self.scale, "alpha": alpha, "dropout_p": dropout_p}
            if self.qkv is not None:
                out = packed_attention(
                    self.qkv(x), self.num_heads, q_pos, k_pos, backend=self.backend, **options
                )
            else:
                assert self.qk is not None  # only Model III has neither
                q, k = self._split_heads(self.qk(x), 2)
                v = self._values(x).to(
                    q.dtype
                )  # without W_v, v is x itself, which autocast leaves in its own dtype
                out = positional_attention(q, k, v, q_pos, k_pos, backend=self.backend, **options)
        else:
            q_map, k_map = self._map_factors()
            out = shared_attention(
                q_map, k_map, self._values(x), scale=self.scale, dropout_p=dropout_p, backend=self.backend
            )
        return self.proj_drop(self.proj(out))

    def attention_map(self, x: Tensor | None = None) -> Tensor:
        """The attention map of every head, without dropout.

        Args:
            x: [B, N, D], as the forward pass sees it. Variants "II" and "III" do not need it.

        Returns:
            [B, heads, N, N]; B = 1 without x.
        """
        if x is not None:
            self._check_input(x)
        if self.variant in ("II", "III"):
            q, k = self._map_factors()
            attention = (self.scale * q @ k.mT).softmax(dim=-1)
            return attention.expand(1 if x is None else x.shape[0], -1, -1, -1)
        if x is None:
            raise ValueError(f'x must be given: the maps of variant "{self.variant}" depend on the tokens')
        q, k = self._split_heads(self._project(x), 2)
        alpha, q_pos, k_pos = self._position_term()
        if q_pos is not None and k_pos is not None:
            q, k = alpha * q + q_pos, alpha * k + k_pos
        return (self.scale * q @ k.mT).softmax(dim=-1)

    def _position_term(self) -> tuple[float, Tensor | None, Tensor | None]:
        """α and (1−α) P W of queries and keys, each [heads, N, r]; nothing in the vanilla variant.

        The bias is in the content term with share α, and here with share 1−α.
        """
        if self.variant == "vanilla":
            return 1.0, None, None
        q_pos, k_pos = self._split_heads((1 - self.alpha) * self._project_position().unsqueeze(0), 2)
        return self.alpha, q_pos.squeeze(0), k_pos.squeeze(0)

    def _map_factors(self) -> tuple[Tensor, Tensor]:
        """Queries and keys [heads, N, r] of the variants whose map does not depend on x."""
        if self.variant == "III":
            return self.q_map, self.k_map.mT
        q, k = self._split_heads(self._project_position().unsqueeze(0), 2)
        return q.squeeze(0), k.squeeze(0)

    def _project_position(self) -> Tensor:
        return self._project(self.pos_embed.unsqueeze(0)).squeeze(0)

    def _project(self, x: Tensor) -> Tensor:
        """[B, N, D] → [B, N, 2·heads·r], by the layer itself: its weight is not all that an adapter, a
        parametrization or a sharded layer multiplies with."""
        layer = self.qk if self.qkv is None else self.qkv
        assert layer is not None  # only Model III has neither
        check_same_device("the layer's weights", layer.weight, pos_embed=self.pos_embed)
        return layer(x)[..., : 2 * self.num_heads * self.head_dim]

    def _values(self, x: Tensor) -> Tensor:
        return self._split_heads(x if self.v is None else self.v(x), 1)[0]

    def _split_heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[B, N, parts·heads·r] → parts views [B, heads, N, r]."""
        x = x.unflatten(2, (parts, self.num_heads, self.head_dim))
        return x.permute(2, 0, 3, 1, 4).unbind(0)

    def _check_input(self, x: Tensor) -> None:
        tokens = self.grid_size[0] * self.grid_size[1]
        check_tensor("x", x, f"[B, {tokens}, {self.dim}]")
        if x.dim() != 3 or x.shape[1] != tokens or x.shape[2] != self.dim:
            raise ValueError(
                f"x must be [B, {tokens}, {self.dim}], the tokens of the {self.grid_size[0]} x "
                f"{self.grid_size[1]} grid without a class token, got {list(x.shape)}"
            )

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, num_heads={self.num_heads}, grid_size={self.grid_size}, variant={self.variant!r}, "
            f"method={self.init_options.method!r}, scale={self.scale:.4g}"
            + (f", alpha={self.alpha}" if self.variant == "I" else "")
            + ("" if self.trainable_mixing else ", trainable_mixing=False")
        )


def _fill_position(module: ConvInitAttention, _: Any) -> None:
    module._fill_position()


def _check_own(module: nn.Module, layer: nn.Linear) -> None:
    """A weight that another module computes is another tensor at each reading: writing to it is lost."""
    if all(layer.weight is not parameter for parameter in module.parameters()):
        raise ValueError(
            f"weights must be parameters of the module, but that of {type(layer).__name__} is computed by "
            "another module (a parametrization, weight_norm, pruning); set it before that is put on"
        )


@torch.no_grad()
def reset_mixing_(
    layers: Sequence[ConvInitAttention], generator: torch.Generator | None = None, *, alike: bool = False
) -> None:
    """Draw offsets, queries and keys of layers made with the same arguments: one fit serves them all.

    Args:
        layers: each a ConvInitAttention; they differ in their draws alone.
        generator: CPU generator.
        alike: every layer gets the draws of the first.
    """
    if not layers:
        return
    first = layers[0]
    if alike:
        reset_mixing_(layers[:1], generator)
        for layer in layers[1:]:
            layer._fill_position()
            layer.offsets.copy_(first.offsets)
            layer._write_qk_(*first._layer_qk())
        return
    for layer in layers:
        layer._fill_position()
    options = first.init_options
    if isinstance(options.offsets, Tensor):
        given: list[Any] = [layer.init_options.offsets for layer in layers]
        options = replace(options, offsets=torch.cat(given))
    parts = options.deal([first.num_heads] * len(layers), first.kernel_size, generator)
    offsets = torch.cat(parts)
    if not options.fits:
        for layer, layer_offsets in zip(layers, parts, strict=True):
            layer.offsets.copy_(layer_offsets)
            layer._draw_qk(generator)
        return

    pos_embed = first.pos_embed.cpu()
    solver = options.solver(first.num_heads)
    free = first.variant == "III" and isinstance(solver, Adam)  # Q and K themselves, whatever P is
    if free:
        pos_embed = torch.eye(len(pos_embed), dtype=pos_embed.dtype, device="cpu")
    elif first.variant == "vanilla":
        pos_embed = F.layer_norm(pos_embed, (first.dim,))
    elif first.variant == "I" and options.by_newton:
        pos_embed = (1 - first.alpha) * pos_embed
    wq, wk, *_ = fitted_qk(
        options,
        pos_embed,
        offsets,
        first.grid_size,
        first.head_dim,
        scale=first.scale,
        num_heads=first.num_heads,
        generator=generator,
    )
    weights = (wq.split(first.num_heads), wk.split(first.num_heads), parts)
    for layer, layer_wq, layer_wk, layer_offsets in zip(layers, *weights, strict=True):
        layer.offsets.copy_(layer_offsets)
        write_ = layer._write_qk_ if free else layer.set_qk_
        write_(layer_wq, layer_wk)


def _head_dim(dim: int, num_heads: int, head_dim: int | None) -> int:
    if head_dim is not None:
        return check_int("head_dim", head_dim)
    if dim % num_heads:
        raise ValueError(
            f"dim must be divisible by num_heads, got {dim} and {num_heads}; or give head_dim explicitly"
        )
    return dim // num_heads


def _refuse_timm_options(dim: int, dim_out: int | None, qk_norm: bool, scale_norm: bool, gated: bool) -> None:
    if dim_out not in (None, dim):
        raise ValueError(f"dim_out must be None or dim = {dim}, got {dim_out}")
    for name, given in (("qk_norm", qk_norm), ("scale_norm", scale_norm), ("gated", gated)):
        if given:
            raise ValueError(
                f"{name} must be False: ConvInitAttention does not have it, and qk_norm would undo the fit"
            )
