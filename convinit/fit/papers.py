"""The papers' own fits, with their constants as defaults."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from convinit._checks import check_int, check_number, check_real
from convinit._files import cache_folder
from convinit._progress import progress
from convinit._version import __version__
from convinit.fit.adam import adam_steps_

_KEEP = 64  # fits by Adam, on disk: they take minutes, and runs that differ in nothing but training share one


@dataclass(frozen=True)
class Adam:
    """Options of ``fit="adam"``: the fit of arXiv 2401.12511 and 2404.01139.

    A fit takes minutes, so the last 64 are kept in $CONVINIT_CACHE_DIR/fits or ~/.cache/convinit/fits. The
    same start, targets, P and options give the same weights at once.

    Attributes:
        lr: learning rate of Adam; its betas and epsilon are PyTorch's defaults.
        steps: number of steps.
        norm_interval: at steps 0, norm_interval, 2 · norm_interval, … the weights are normalised again.
        heads: heads of one layer; 0 means all that are fitted together. The loss is a mean over them, and the
            norm to which weights are brought back is theirs: layers fitted together get what each would get
            alone.
    """

    lr: float = 1e-4
    steps: int = 10_000
    norm_interval: int = 100
    heads: int = 0

    def __post_init__(self) -> None:
        check_number("lr", self.lr)
        check_int("steps", self.steps)
        check_int("norm_interval", self.norm_interval)
        check_int("heads", self.heads, minimum=0)


@dataclass(frozen=True)
class SVD:
    """Options of ``fit="svd"``: the fit of arXiv 2505.19985.

    The authors scale the parameter P by 18 once, at the start, and fit LayerNorm(P), which is what the first
    layer's queries and keys see: pass that. The result does not depend on the size of what is passed, so
    `18 * P` gives the weights of P and not those of LayerNorm(P).

    Attributes:
        impulse_logit: logit of the target.
        noise, noise_std: the other logits are noise · TruncatedNormal(std noise_std, cut at ±2).
        weight_norm: Frobenius norm of each factor.
    """

    impulse_logit: float = 1000.0
    noise: float = 3.0
    noise_std: float = 0.6
    weight_norm: float = 7.0

    def __post_init__(self) -> None:
        for name in ("impulse_logit", "noise_std", "weight_norm"):
            check_number(name, getattr(self, name))
        if check_real("noise", self.noise) < 0:
            raise ValueError(f"noise must be finite and at least 0, got {self.noise}")


def fit_adam(
    pos_embed: Tensor,
    targets: Tensor,
    rank: int,
    *,
    scale: float,
    options: Adam,
    generator: torch.Generator | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """W_q, W_k [B, D, r] by Adam on mse(softmax(σ P W_q W_kᵀ Pᵀ), M), as in arXiv 2401.12511.

    Both start as U(±√(1/(r · heads))). At every `norm_interval`-th step W_q [B, D, r] is divided by its norm
    over D and W_kᵀ [B, r, D] by its norm over r, and both are multiplied by the mean initial norm of the
    columns of their layer's W_q. All arguments and results are on the CPU; the steps are made on `device`.

    The result is kept on disk, and found there by all that it depends on.
    """
    P = pos_embed.to(torch.promote_types(pos_embed.dtype, torch.float32))
    heads = options.heads or max(len(targets), 1)
    bound = (1 / (rank * heads)) ** 0.5

    def uniform(*shape: int) -> Tensor:
        return torch.empty(shape).uniform_(-bound, bound, generator=generator).to(P)

    # Layer by layer, so that layers fitted together start where each would alone.
    layers = [len(part) for part in targets.split(heads)]
    starts = [(uniform(n, P.shape[1], rank), uniform(n, rank, P.shape[1])) for n in layers]
    norms = [start.norm(dim=1).mean().expand(len(start), 1, 1) for start, _ in starts]
    wq, wk_t = (torch.cat(parts) for parts in zip(*starts, strict=True))
    path = _kept_at(options, scale, heads, device.type, P, targets, wq, wk_t)
    with suppress(Exception):  # there is none, or it is damaged
        kept_wq, kept_wk = torch.load(path, weights_only=True)
        if kept_wq.shape == kept_wk.shape == wq.shape:
            return kept_wq, kept_wk
    # P in a basis of its row space, which leaves rounding alone to tell the fits apart.
    U, S, Vh = torch.linalg.svd(P.double(), full_matrices=False)
    kept = S > torch.finfo(P.dtype).eps * S[0]
    tokens, directions, targets, wq, wk = (
        x.to(device).contiguous()
        for x in ((U[:, kept] * S[kept]).to(P), Vh[kept].T.to(P), targets, wq, wk_t.mT)
    )
    norm = torch.cat(norms).to(wq)
    moments = wq.new_zeros(2, 2, *wq.shape)
    for step in progress(
        range(0, options.steps, options.norm_interval), "fitting with Adam", unit="interval"
    ):
        wq *= norm / wq.norm(dim=1, keepdim=True)
        wk *= norm / wk.norm(dim=2, keepdim=True)
        adam_steps_(
            tokens, directions, targets, wq, wk, moments, scale=scale, heads=heads, lr=options.lr,
            first_step=step, steps=min(options.norm_interval, options.steps - step),
        )  # fmt: skip
    wq, wk = wq.cpu(), wk.cpu()
    with suppress(OSError, RuntimeError):  # where nothing may be written, the next call fits anew
        _keep(path, (wq, wk))
    return wq, wk


def _kept_at(*given: object) -> Path:
    digest = sha256()
    for each in (__version__, torch.__version__, *given):  # another version may round otherwise
        digest.update(repr(tuple(each.shape) if isinstance(each, Tensor) else each).encode())
        if isinstance(each, Tensor):
            digest.update(each.contiguous().numpy().tobytes())
    return cache_folder() / "fits" / f"adam-{digest.hexdigest()[:24]}.pt"


def _keep(path: Path, weights: tuple[Tensor, Tensor]) -> None:
    """Writes a fit, whole or not at all, and removes the oldest ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        torch.save(weights, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    for old in sorted(path.parent.glob("adam-*.pt"), key=lambda each: each.stat().st_mtime)[:-_KEEP]:
        old.unlink(missing_ok=True)


def fit_svd(
    pos_embed: Tensor, targets: Tensor, rank: int, *, options: SVD, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """W_q, W_k [B, D, r] from the pseudo-inverse of wanted logits, as in arXiv 2505.19985.

    L = impulse_logit · M + noise · TruncatedNormal off the impulse;  A = P⁺ L P⁺ᵀ with P⁺ = (PᵀP)⁺ Pᵀ, the
    inverse cut to its r largest eigenvalues;  A ≈ U S Vᵀ;  W_q = U √S and W_k = V √S, each scaled to the
    Frobenius norm asked.
    """
    P = pos_embed.double()
    n = P.shape[0]
    # Drawn together: what trunc_normal_ draws again depends on all that it draws.
    noise = torch.empty(len(targets), n, n, dtype=torch.float64)
    torch.nn.init.trunc_normal_(noise, std=options.noise_std, generator=generator).mul_(options.noise)
    energy, V = torch.linalg.eigh(P.T @ P)
    energy, V = energy.flip(0)[:rank], V.flip(1)[:, :rank]
    kept = energy > torch.finfo(torch.float64).eps * P.shape[1] * energy[0]
    inverse = (V[:, kept] / energy[kept]) @ V[:, kept].T @ P.T  # P⁺ [D, N]
    wq, wk = P.new_empty(2, len(targets), P.shape[1], rank)
    for b in progress(range(len(targets)), "fitting by SVD", unit="head"):
        logits = noise[b]
        rows = (targets[b] >= 0).nonzero()[:, 0]
        logits[rows, targets[b, rows]] = options.impulse_logit
        form = inverse @ logits @ inverse.T
        if not form.isfinite().all():
            raise ValueError(f"noise and impulse_logit must be smaller, got {options}")
        U, S, Vh = torch.linalg.svd(form, full_matrices=False)
        for w, vectors in ((wq, U), (wk, Vh.mT)):
            factor = vectors[:, :rank] * S[:rank].sqrt()
            w[b] = factor * (options.weight_norm / factor.norm())
    return wq, wk
