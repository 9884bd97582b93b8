from __future__ import annotations

import pytest
import torch

from convinit.fit.adam import adam_steps_

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def problem(n=35, basis=11, dim=41, rank=6, heads=3, dtype=torch.float32, device="cpu"):
    """Tokens, directions, targets, weights and moments; some rows have no target."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    directions = torch.linalg.qr(normal(dim, basis)).Q.contiguous()
    targets = torch.randint(-1, n, (heads, n), generator=generator)
    moments = torch.zeros(2, 2, heads, dim, rank)
    floats = normal(n, basis), directions, normal(heads, dim, rank), normal(heads, dim, rank), moments
    tokens, directions, *state = (x.to(device, dtype) for x in floats)
    return tokens, directions, targets.to(device), *state


ARGUMENTS = {"scale": 0.2, "heads": 3, "lr": 1e-2}


def test_follows_autograd_and_torch_adam():
    tokens, directions, targets, wq, wk, moments = problem(dtype=torch.float64)
    P, M = tokens @ directions.T, torch.zeros(3, 35, 35, dtype=torch.float64)
    for b, n in (targets >= 0).nonzero().tolist():
        M[b, n, targets[b, n]] = 1
    q, k = wq.clone().requires_grad_(), wk.clone().requires_grad_()
    optimizer = torch.optim.Adam([q, k], lr=1e-2)
    for step in range(4):
        optimizer.zero_grad()
        errors = (torch.softmax(0.2 * (P @ q) @ (P @ k).mT, dim=-1) - M).square().mean(dim=(1, 2))
        (errors.sum() / 3).backward()
        optimizer.step()
        loss = adam_steps_(
            tokens, directions, targets, wq, wk, moments, **ARGUMENTS, first_step=step, steps=1
        )
        torch.testing.assert_close(loss, errors.detach())
    torch.testing.assert_close(wq, q.detach())
    torch.testing.assert_close(wk, k.detach())


@devices
def test_no_heads_and_no_steps(device):
    inputs = problem(heads=0, device=device)
    assert adam_steps_(*inputs, **ARGUMENTS, first_step=0, steps=3).shape == (0,)
    inputs = problem(device=device)
    before = [x.clone() for x in inputs]
    assert torch.equal(adam_steps_(*inputs, **ARGUMENTS, first_step=0, steps=0).cpu(), torch.zeros(3))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("target", [-2, 35, 2**32])
def test_targets_outside_are_refused(target):
    inputs = problem()
    inputs[2][1, 3] = target
    with pytest.raises(ValueError, match=r"targets must lie in \[-1, 35\)"):
        adam_steps_(*inputs, **ARGUMENTS, first_step=0, steps=2)
