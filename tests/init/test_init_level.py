"""Fits to a sin-cos P, whose maps tokens of unequal norms shall not blur."""

import warnings

import pytest
import torch
from torch.nn.functional import layer_norm

from convinit.adapters.subspace import smooth_position
from convinit.init.level import Level
from convinit.init.options import InitOptions
from convinit.init.query_key import fitted_qk
from convinit.nn import sincos_2d

GRID, DIM, RANK, SCALE = (8, 8), 96, 32, 32**-0.5
OFFSETS = torch.tensor([(0, 0), (1, 1), (-1, 0)])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sin_cos():
    return layer_norm(sincos_2d(GRID, DIM), (DIM,))


def fitted(P, unequal_tokens=True, class_tokens=False, **options):
    return fitted_qk(
        InitOptions(**options), P, OFFSETS, GRID, RANK, scale=SCALE, num_heads=len(OFFSETS),
        generator=seeded(), unequal_tokens=unequal_tokens, class_tokens=class_tokens,
    )  # fmt: skip


def logits(P, wq, wk, scale=SCALE):
    return scale * (P @ wq).double() @ (P @ wk).double().mT


def peak(P, wq, wk, targets, scale=SCALE):
    maps, inside = logits(P, wq, wk, scale).softmax(dim=-1), targets >= 0
    return float(maps.gather(2, targets.clamp(min=0)[..., None])[..., 0][inside].mean())


def test_unequal_norms_do_not_blur_the_maps():
    P = sin_cos()
    noise = 1 + 0.2 * torch.randn(16, len(P), 1, generator=seeded(1))
    before, after = (fitted(P, unequal_tokens=level)[:3] for level in (False, True))
    for each in (before, after):
        assert peak(P, *each) == pytest.approx(0.7, abs=0.01)
    blurred, kept = (sum(peak(P * r, *each) for r in noise) / len(noise) for each in (before, after))
    assert blurred < 0.45 and kept > 0.6


@pytest.mark.parametrize("class_tokens", [False, True])
def test_rows_are_level(class_tokens):
    P = sin_cos()
    wq, wk, targets, fit = fitted(P, class_tokens=class_tokens)
    distance = (logits(P, wq, wk).amax(dim=2) - 5).abs()
    assert float(distance[targets >= 0].max()) < 1.5
    assert (float(distance[targets < 0].max()) < 1.5) is class_tokens
    torch.testing.assert_close(fit.weight_norm, wq.double().norm(dim=(1, 2)), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        fit.attention_map().double(), logits(P, wq, wk).softmax(dim=-1), rtol=1e-3, atol=1e-5
    )


def test_controls_have_the_norm_of_the_impulses():
    norms = {
        method: fitted(sin_cos(), method=method)[0].norm(dim=(1, 2))
        for method in ("impulse", "scrambled", "norm_matched")
    }
    for each in norms.values():
        torch.testing.assert_close(each, norms["impulse"], rtol=1e-3, atol=0)


def test_a_weight_norm_that_was_given_stays():
    wq, wk, *_ = fitted(sin_cos(), weight_norm=4.0)
    assert wq.norm(dim=(1, 2)).tolist() == pytest.approx([4.0] * 3, rel=1e-3)


def without_the_constant():
    P = torch.randn(64, DIM, generator=seeded(2))
    return P - P.mean(dim=0)


def moved():
    """As after a step of training: the constant is in the row space, but in weak directions."""
    P = smooth_position(GRID, DIM, RANK, seeded())
    return P + 0.01 * torch.randn(P.shape, generator=seeded(1))


@pytest.mark.parametrize("make", [without_the_constant, moved])
def test_without_a_strong_constant_the_fit_is_as_always(make):
    P = make()
    assert Level.of(P, RANK) is None
    for a, b in zip(fitted(P), fitted(P, unequal_tokens=False), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)


def test_the_papers_fits_stay():
    (wq, wk), same = (fitted(sin_cos(), level, fit="svd")[:2] for level in (True, False))
    assert torch.equal(wq, same[0]) and torch.equal(wk, same[1])


@pytest.mark.parametrize(("grid", "rank"), [((8, 8), 8), ((14, 14), 8), ((7, 7), 6), ((8, 8), 4)])
def test_small_heads(grid, rank):
    """The constant takes one direction of the head; too small ones are fitted as always."""
    P = layer_norm(sincos_2d(grid, DIM), (DIM,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wq, wk, targets, fit = fitted_qk(
            InitOptions(), P, OFFSETS, grid, rank, scale=rank**-0.5, num_heads=3, generator=seeded(),
            unequal_tokens=True,
        )  # fmt: skip
    assert wq.shape == (3, DIM, rank)
    assert peak(P, wq, wk, targets, rank**-0.5) == pytest.approx(0.7, abs=0.01)
    assert (fit.weight_norm < 8).all()
