"""`init_vit_`: the one door to all initialisations of a model that is already there."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from convinit._checks import came, check_grid_size, check_int
from convinit.adapters.additive import AdditiveLayout
from convinit.adapters.find import find_layouts, unwrapped
from convinit.adapters.layout import Layout, is_sharded, reshard_
from convinit.adapters.measure import measure_on_images_, without_autocast
from convinit.adapters.report import InitReport
from convinit.adapters.request import Request
from convinit.fit.api import Solver
from convinit.records import LayerRecord


@torch.no_grad()
def init_vit_(
    model: nn.Module,
    *,
    kernel_size: int | None = None,
    method: str = "impulse",
    fit: str | Solver = "newton",
    weight_norm: float | None = None,
    peak: float | None = None,
    alpha: float | None = None,
    values: str = "mimetic",
    distribution: str = "normal",
    layers: str | int | slice | Sequence[int] = "all",
    offsets: Tensor | str | None = None,
    padding_mode: str = "zeros",
    position: str | None = None,
    pos_embed_gain: float | None = None,
    grid_size: Sequence[int] | None = None,
    pos_embed: Tensor | None = None,
    adapter: Callable[[nn.Module, str], Layout | None] | None = None,
    images: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> InitReport:
    """Sets every self-attention over a token grid so that its map starts as a random impulse convolution.

    softmax(scale · q kᵀ) ≈ impulse_matrix(offset of the head), on images, in every layer

    report = convinit.init_vit_(model, images=batch)

    In place, before training; the architecture stays. Known are timm's VisionTransformer family,
    torchvision's, Hugging Face's ViT, DeiT and ViTMAE, vit-pytorch's ViT and SimpleViT, convinit's own, ViTs
    with rotary position embedding and biases, Swin (its relative position bias) and MLP-Mixer, also inside a
    larger model, behind torch.compile or DDP, and sharded by FSDP2. For others give `grid_size` and
    `pos_embed`, or an `adapter`.

    Where a position embedding P is added to the tokens, it gets a subspace V of the residual stream for
    itself: P = P V Vᵀ, W ← (I − V Vᵀ) W for all that writes to the stream (patch embedding, output layers,
    the MLPs' second layers, class and register tokens). Queries and keys are fitted to P within V, so the
    images do not disturb them, and each layer's are multiplied by the factor that gives its maps their peak
    on images, found in one forward pass.

    Args:
        model: in place. Frozen queries and keys are left alone, and the report says so.
        kernel_size: offsets are drawn from the f×f window; odd, and at most 2·min(H, W) − 1. None means
            half the grid, 3 to 7: 3 on 8 × 8 tokens, 7 on 14 × 14.
        method: what queries and keys start as. "impulse"; "mimetic" (arXiv 2305.09828); "random", U(±√(1/D));
            "default", as the library drew them; or a control: "position_only" (queries and keys stay as the
            library drew them, all else is done), "scrambled" (a random permutation of the tokens in place of
            a shift), "norm_matched" (random directions), the last two with the weight norm of the impulse fit
            and the factors that impulses would need. Swin's table of biases gives all tokens of a window one
            shift; there "scrambled" is one beyond f×f that wraps around, as sharp as an impulse, and
            "norm_matched" a random table. MLP-Mixer has no queries and keys, so neither "mimetic" nor
            "random"; its controls are permutations and dense random weights.
        fit: the solver of the impulses, "newton", "adam", "svd" or options as in :func:`convinit.fit_qk`. The
            papers' two are not their weights where there are class tokens (here orthogonal to the fit) or
            biases (here 0).
        weight_norm, peak: how sharp, see :func:`convinit.fit_qk`; None means peak = 0.7. With a weight norm
            nothing is measured. With qk_norm the peak is set by the weights of those norms.
        alpha: only for convinit's own models: their attribute, the content share of Model I.
        values: "mimetic" sets values and output layer so that their product is 0.4·Z − 0.4·I, biases 0 (arXiv
            2305.09828); "default" leaves them as the library drew them.
        distribution: of the noise in mimetic queries and keys, see :func:`convinit.init.mimetic_qk_`.
        layers: "all", or the numbers of those to set: an int, a slice or several ints.
        offsets: (dy, dx) of the heads of the chosen layers, [heads of all layers, 2] or [layers, heads, 2].
            None deals them out so that every f² heads in a row cover the window once (stratified over the
            layers); "random" draws each by itself, as :func:`convinit.sample_offsets`; "fixed" is the order
            of arXiv 2505.19985, the same in every layer (f = 3).
        padding_mode: where tokens look whose target is off the grid, see :func:`convinit.impulse_matrix`. Of
            biases "zeros", and in Swin also "circular".
        position: "subspace": P gets its subspace. One that is as libraries draw it, noise or the same for all
            tokens, is replaced by the lowest cosines of the grid, turned into D at random, as large as the
            content (rms). Any other is kept, and V is its row space: sin-cos, one that was loaded, what an
            earlier call made. "new": P is replaced in any case. "keep": P and all that writes to the stream
            stay; the image then blurs the maps, and a warning says how much. None means "subspace", but
            "keep" for the methods "mimetic", "random" and "default", and for the papers' fits, which know no
            subspace.
        pos_embed_gain: multiplies P (the patches' rows) in place, once, however often the function is called
            on one model object; implies position="keep". arXiv 2505.19985 multiplies the parameter by 18 as
            well, the class token's row with it.
        grid_size: (H, W) of the tokens, for models that are not known, and for those that do not keep their
            grid (vit-pytorch's ViT; `images` show it as well).
        pos_embed: P [N, D] as it is added to the tokens, for models that are not known; row-major.
        adapter: ``adapter(module, name) -> Layout | None``, asked before the known ones; see
            :mod:`convinit.adapters.layout`.
        images: a batch as the model takes it, 8 or more of those it will be trained on. None means synthetic
            images with the contrasts of photographs.
        generator: CPU generator. One seed gives the same weights at every call and on every device. On a CPU
            that rounds otherwise they may be others, as good. On several processes (DDP, FSDP2) give one with
            the same seed on each.

    Returns:
        :class:`InitReport`: what every head got.

    Raises:
        TypeError, ValueError: an argument is wrong; no attention over a token grid was found (the message
            lists what was); something that convinit does not know writes to V; the model looks trained: its
            norms are not as drawn, or P is neither drawn nor of low rank. The model is then as before.

    Warns:
        UserWarning: the mean attention on the target on images misses the peak by more than 0.1 in a layer.

    Source: arXiv 2401.12511 (impulses), 2404.01139 (P behind LayerNorm), 2505.19985 (learned P). The
    subspace, the factors, and offsets stratified over the layers are ours; that training makes such a
    subspace is reported by arXiv 2310.04861. docs/init_vit has what each choice was measured to do.
    """
    start = time.perf_counter()
    seed = torch.initial_seed() if generator is None else generator.initial_seed()
    inner = unwrapped(model)
    reshard_(inner)  # after a forward pass of the caller's
    shared = _on_several_processes(model, inner)
    if shared and generator is None:
        raise ValueError(
            "generator must be given for a model on several processes: torch.Generator().manual_seed(seed), "
            "with the same seed on each, so that all of them set the same weights"
        )
    request = Request(
        method=method, fit=fit, values=values, kernel_size=kernel_size, peak=peak, weight_norm=weight_norm,
        padding_mode=padding_mode, offsets=offsets, distribution=distribution, alpha=alpha, position=position,
        pos_embed_gain=pos_embed_gain, generator=generator, model=inner, images=images, shared=shared,
    )  # fmt: skip
    if grid_size is not None:
        grid_size = check_grid_size(grid_size)
    found = find_layouts(inner, grid_size=grid_size, pos_embed=pos_embed, adapter=adapter, images=images)
    every = [(layout, i) for layout in found for i in range(len(layout.attentions))]
    layer_numbers = _chosen(layers, len(every))
    chosen = [every[number] for number in layer_numbers]
    kernel_size = request.window([layout.grid_of(i) for layout, i in chosen])
    dealt = request.deal([layout.attentions[i].num_heads for layout, i in chosen], kernel_size, generator)

    records: list[LayerRecord] = []
    with ExitStack() as contexts, without_autocast(model):
        for layout in found:  # undone in all parts of the model, if one is refused
            if isinstance(layout, AdditiveLayout):
                contexts.enter_context(layout.undone_on_error())
        for layout in found:
            mine = [j for j, (owner, _) in enumerate(chosen) if owner is layout]
            if not mine:
                continue
            own = layout.init_(request, [chosen[j][1] for j in mine], torch.cat([dealt[j] for j in mine]))
            for j, record in zip(mine, own, strict=True):
                record.layer = layer_numbers[j]
            records += own
    placed = {layout.placed for layout in found if isinstance(layout, AdditiveLayout) and layout.placed}
    options = {
        "fit": (fit if isinstance(fit, str) else repr(fit)) if request.fits else None,
        "values": values, "position": ", ".join(sorted(placed)) or None,
        "pos_embed_gain": request.pos_embed_gain, "kernel_size": kernel_size, "peak": request.target_peak,
        "weight_norm": request.weight_norm, "alpha": request.alpha, "padding_mode": padding_mode,
        "layers": str(layers), "seed": seed, "offsets": request.rule,
    }  # fmt: skip
    report = InitReport(
        records,
        found[0].grid_size,
        method,
        time.perf_counter() - start,
        notes=[note for layout in found for note in getattr(layout, "notes", ())],
        places=chosen,
        options={name: value for name, value in options.items() if value is not None},
        images="yours" if images is not None else "synthetic",
    )
    if images is not None and any(not isinstance(layout, AdditiveLayout) for layout in found):
        try:
            measure_on_images_(report, inner, images)
        except ValueError as error:  # what was done to the model must not be lost for that
            report.notes.append(str(error))
            warnings.warn(f"convinit: {error}", stacklevel=3)
    missed = report.missed()
    if missed:
        warnings.warn(missed, stacklevel=3)
    return report


def _on_several_processes(model: nn.Module, inner: nn.Module) -> bool:
    """Processes that draw for themselves would each get another model."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in (model, *inner.modules())):
        raise ValueError(
            "model must not be wrapped in FullyShardedDataParallel (FSDP1), whose parameters are flat "
            "shards; call init_vit_ before wrapping it, or use fully_shard (FSDP2)"
        )
    return isinstance(model, nn.parallel.DistributedDataParallel) or any(
        is_sharded(parameter) for parameter in inner.parameters()
    )


def _chosen(layers: str | int | slice | Sequence[int], count: int) -> list[int]:
    every = range(count)
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f'layers must be "all", an int, a slice or several ints, got {layers!r}')
        return list(every)
    if isinstance(layers, slice):
        picked = list(every[layers])
    else:
        several = [layers] if hasattr(layers, "__index__") and not hasattr(layers, "__len__") else layers
        if not isinstance(several, Iterable):
            raise TypeError(f'layers must be "all", an int, a slice or several ints, got {came(layers)}')
        wanted = [check_int("layers", i, minimum=-(2**63)) for i in several]  # NumPy's integers too
        if not all(-count <= i < count for i in wanted):
            raise ValueError(f"layers must lie in 0 to {count - 1}, the layers of this model, got {layers}")
        picked = sorted({int(i) % count for i in wanted})
    if not picked:
        raise ValueError(f"layers must choose at least one of the {count} layers, got {layers}")
    return picked
