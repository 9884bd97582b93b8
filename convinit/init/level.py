"""Fits to a P whose row space holds the constant, as that of a sin-cos P does, for tokens of unequal norms.

Content makes the norms of tokens unequal, so behind a norm token j shows r_j P_j in place of P_j, and logits
become r_i r_j L_ij. Where the largest logits of a row are large and alike, small differences of r_j choose
between them. Softmax does not see what all keys of a row have in common. A direction u with P u = 1 lets
queries take that off: W_q W_kᵀ + a uᵀ adds (P a)_i to row i.

Sin-cos has few strong directions, which make such rows: on 8 × 8 tokens a peak of 0.7 needs target logits of
16, and norms that differ by 10 and 20 % leave 0.53 and 0.39 of 0.70. With logits of 5 they leave 0.68 and
0.63. docs/init_vit has what networks learn from both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convinit.fit import QKFit
from convinit.fit.newton import one_thread, random_rotations
from convinit.fit.result import norms_of

# Logits of 0 would be blurred as little, but class tokens have those, and shall have little attention.
_LOGIT = 5.0
_CONSTANT = 0.02  # rms of P u - 1 up to which P holds the constant: sin-cos 0.003, cosines without it 0.99
# The fit is to P with its singular values to this power. Weaker directions then carry more of a map, which
# lowers the logits that it needs; at 0.25 the weights are three times as large, and networks learn badly.
_POWER = 0.5
_SMALLEST_DIRECTION = 1e-3  # as a share of the strongest
_RIDGE = 1e-6  # as a share of the strongest direction's square


@dataclass(frozen=True, eq=False)
class Level:
    """P = Z Vᵀ with orthogonal columns of Z, and Z u = 1.

    Attributes:
        pos_embed: P [N, D].
        V: [D, k] float64, orthonormal columns.
        Z: [N, k].
        u: [k].
        stretch: [k], what directions are multiplied by for the fit.
    """

    pos_embed: Tensor
    V: Tensor
    Z: Tensor
    u: Tensor
    stretch: Tensor

    @classmethod
    def of(cls, pos_embed: Tensor) -> Level | None:
        """None where the row space of P does not hold the constant."""
        with one_thread():
            U, S, Vh = torch.linalg.svd(pos_embed.double(), full_matrices=False)
        strong = S > _SMALLEST_DIRECTION * S[0]
        U, S = U[:, strong], S[strong]
        constant = U.sum(dim=0)
        if (U @ constant - 1).square().mean().sqrt() > _CONSTANT:
            return None
        stretch = S ** (_POWER - 1)
        return cls(pos_embed, Vh[strong].mT, U * S, constant / S, stretch * S.norm() / (S * stretch).norm())

    @property
    def fitted_to(self) -> Tensor:
        """[N, D]: what the fit is to."""
        return (self.Z * self.stretch @ self.V.mT).to(self.pos_embed)

    def level(self, fit: QKFit, generator: torch.Generator | None) -> QKFit:
        """A fit to `fitted_to` as one to P: the same maps, from logits of 5 at the targets."""
        targets, rank = fit.targets, fit.wq.shape[2]
        with one_thread():
            q, k = (self.stretch[:, None] * (self.V.mT @ w.double()) for w in (fit.wq, fit.wk))  # [B, k, r]
            inside = (targets >= 0).double()
            keys = torch.take_along_dim(self.Z @ k, targets.clamp(min=0)[..., None], dim=1)
            missing = inside * (_LOGIT / fit.scale - (self.Z @ q * keys).sum(dim=-1))  # [B, N]
            gram = self.Z.mT @ (inside[..., None] * self.Z)
            gram.diagonal(dim1=1, dim2=2).add_(_RIDGE * self.Z.square().sum(dim=0).max())
            a = torch.linalg.solve(gram, missing @ self.Z)  # least squares over rows with a target
            U, S, Vh = torch.linalg.svd(q @ k.mT + a[..., None] * self.u)
            S = S[:, None, :rank].sqrt()
            rotation = random_rotations(len(targets), rank, S.shape[2], generator)
            wq, wk = ((self.V @ (w[..., :rank] * S) @ rotation).to(fit.wq) for w in (U, Vh.mT))
        weight_norm = (norms_of(wq) * norms_of(wk)).sqrt()
        return replace(fit, wq=wq, wk=wk, weight_norm=weight_norm, pos_embed=self.pos_embed)
