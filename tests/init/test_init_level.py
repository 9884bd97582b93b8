"""Fits to a sin-cos P, whose maps tokens of unequal norms shall not blur."""

import dataclasses

import pytest
import torch

import convinit
from convinit.init.level import Level
from convinit.init.options import InitOptions
from convinit.init.query_key import fitted_qk
from convinit.nn import sincos_2d

GRID, DIM, RANK, SCALE = (8, 8), 96, 32, 32**-0.5
OFFSETS = torch.tensor([(0, 0), (1, 1), (-1, 0)])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sin_cos():
    P = sincos_2d(GRID, DIM)
    return torch.nn.functional.layer_norm(P, P.shape[1:])


def fitted(P, unequal_tokens=True, **options):
    return fitted_qk(
        InitOptions(**options), P, OFFSETS, GRID, RANK, scale=SCALE, num_heads=len(OFFSETS),
        generator=seeded(), unequal_tokens=unequal_tokens,
    )  # fmt: skip


def logits(P, wq, wk):
    return SCALE * (P @ wq).double() @ (P @ wk).double().mT


def peak(P, wq, wk, targets):
    maps, inside = logits(P, wq, wk).softmax(dim=-1), targets >= 0
    return float(maps.gather(2, targets.clamp(min=0)[..., None])[..., 0][inside].mean())


def test_unequal_norms_do_not_blur_the_maps():
    P = sin_cos()
    noise = 1 + 0.2 * torch.randn(16, len(P), 1, generator=seeded(1))
    before, after = (fitted(P, unequal_tokens=level)[:3] for level in (False, True))
    for each in (before, after):
        assert peak(P, *each) == pytest.approx(0.7, abs=0.01)
    blurred, kept = (sum(peak(P * r, *each) for r in noise) / len(noise) for each in (before, after))
    assert blurred < 0.45 and kept > 0.6


def test_the_targets_have_level_logits():
    P = sin_cos()
    wq, wk, targets, fit = fitted(P)
    found = logits(P, wq, wk).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    assert float((found - 5)[targets >= 0].abs().max()) < 1.5
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


def test_without_the_constant_the_fit_is_as_always():
    P = torch.randn(len(sin_cos()), DIM, generator=seeded(2))
    P -= P.mean(dim=0)
    assert Level.of(P) is None
    for a, b in zip(fitted(P), fitted(P, unequal_tokens=False), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)


def test_fewer_columns_than_directions():
    """The product has one direction more than the fit, and the weakest is left out."""
    P = sin_cos()
    level = Level.of(P)
    assert level is not None and len(level.u) > 8
    fit = convinit.fit_qk(level.fitted_to, OFFSETS, GRID, 8, scale=8**-0.5, generator=seeded())
    new = level.level(fit, seeded())
    assert new.wq.shape == fit.wq.shape and dataclasses.asdict(new).keys() == dataclasses.asdict(fit).keys()
    maps = new.attention_map()
    found = maps.gather(2, fit.targets.clamp(min=0)[..., None])[..., 0]
    assert float(found[fit.targets >= 0].mean()) == pytest.approx(float(fit.peak.mean()), abs=0.05)
