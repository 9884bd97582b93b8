"""Fits to a P whose row space holds the constant, as that of a sin-cos P does, for tokens of unequal norms.

Content makes the norms of tokens unequal, so behind a norm token j shows r_j P_j in place of P_j, and logits
become r_i r_j L_ij. Where the largest logits of a row are large and alike, small differences of r_j choose
between them. Softmax does not see what all keys of a row have in common. A direction u with P u = 1 lets
queries take that off: W_q W_kᵀ + a uᵀ adds (P a)_i to row i.

Sin-cos has few strong directions, which make such rows: on 8 × 8 tokens a peak of 0.7 needs target logits of
16, and norms that differ by 10 and 20 % leave 0.55 and 0.40 of 0.70. With logits of 5 they leave 0.69 and
0.65. docs/init_vit has what networks learn from both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convinit.fit import QKFit
from convinit.fit.newton import one_thread, random_rotations
from convinit.fit.result import norms_of

# Of the largest logit of a row. 0 would be blurred as little, but is that of class tokens, whose share shall
# be small.
_LOGIT = 5.0
# P holds the constant if P u = 1 up to this rms error: sin-cos 0.003, cosines without the constant 0.99.
_ERROR = 0.02
# And if u is small: its norm times the rms norm of P's rows, 1.1 to 1.3 for sin-cos. A smooth P that was
# learned has 3 to 5, and independent rows have 30 and more: training soon blurs what such a u adds.
_SIZE = 2.0
# The fit is to P with its singular values to this power. Weaker directions then carry more of a map, which
# lowers the logits that it needs; at 0.25 the weights are three times as large, and networks learn badly.
_POWER = 0.5
# Of the fit's rank, as a share of the directions of P. With 0.33 and less the fit to square roots needs
# weights ten times as large, with 0.41 and more it does not.
_RANK = 0.4
_SMALLEST_DIRECTION = 1e-3  # as a share of the strongest
_RIDGE = 1e-6  # as a share of the strongest direction's square


@dataclass(frozen=True, eq=False)
class Level:
    """P = Z Vᵀ with orthogonal columns of Z, and Z u = 1.

    Attributes:
        pos_embed: P [N, D].
        rank: r of the heads.
        V: [D, k] float64, orthonormal columns.
        Z: [N, k].
        u: [k].
        stretch: [k], what directions are multiplied by for the fit.
    """

    pos_embed: Tensor
    rank: int
    V: Tensor
    Z: Tensor
    u: Tensor
    stretch: Tensor

    @classmethod
    def of(cls, pos_embed: Tensor, rank: int) -> Level | None:
        """None where P does not hold the constant, or only weakly, and where heads are too small."""
        with one_thread():
            U, S, Vh = torch.linalg.svd(pos_embed.double(), full_matrices=False)
        strong = S > _SMALLEST_DIRECTION * S[0]
        U, S = U[:, strong], S[strong]
        constant = U.sum(dim=0)
        u = constant / S
        error, size = (U @ constant - 1).square().mean().sqrt(), u.norm() * S.norm() / len(U) ** 0.5
        if error > _ERROR or size > _SIZE:
            return None
        stretch = S ** (_POWER - 1)
        stretch = stretch * S.norm() / (S * stretch).norm()
        level = cls(pos_embed, rank, Vh[strong].mT, U * S, u, stretch)
        return level if level.fitted_rank >= _RANK * len(S) else None

    @property
    def fitted_to(self) -> Tensor:
        """[N, D]: what the fit is to."""
        return (self.Z * self.stretch @ self.V.mT).to(self.pos_embed)

    @property
    def fitted_rank(self) -> int:
        """r of the fit: u takes one dimension of a head, unless a head has enough for all directions of P."""
        return self.rank if self.rank >= len(self.u) else self.rank - 1

    def levelled(self, fit: QKFit, generator: torch.Generator | None, *, class_tokens: bool) -> QKFit:
        """A fit to `fitted_to` as one to P: the same maps, the largest logit of each row 5.

        Rows without a target count only where there are class tokens, to which they would be drawn. They make
        the other rows less level, and where there are none, networks learn better without them.
        """
        with one_thread(), torch.device("cpu"):
            q, k = (self.stretch[:, None] * (self.V.mT @ w.double()) for w in (fit.wq, fit.wk))  # [B, k, r]
            rows = zip(self.Z @ q, self.Z @ k, strict=True)  # one head at a time, for logits are [N, N]
            missing = torch.stack([_LOGIT / fit.scale - (x @ y.mT).amax(dim=1) for x, y in rows])  # [B, N]
            rows_used = ((fit.targets >= 0) | class_tokens).double()
            gram = self.Z.mT @ (rows_used[..., None] * self.Z)  # of least squares: P a = missing
            gram.diagonal(dim1=1, dim2=2).add_(_RIDGE * self.Z.square().sum(dim=0).max())
            a = torch.linalg.solve(gram, (rows_used * missing) @ self.Z)
            U, S, Vh = torch.linalg.svd(q @ k.mT + a[..., None] * self.u)
            S = S[:, None, : self.rank].sqrt()
            rotation = random_rotations(len(a), self.rank, S.shape[2], generator)
            wq, wk = ((self.V @ (w[..., : self.rank] * S) @ rotation).to(fit.wq) for w in (U, Vh.mT))
        weight_norm = (norms_of(wq) * norms_of(wk)).sqrt()
        return replace(fit, wq=wq, wk=wk, weight_norm=weight_norm, pos_embed=self.pos_embed)
