from __future__ import annotations

import pytest
import torch

from convinit.ops.qk_adam import qk_adam, qk_adam_reference

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


def check_as_close_as_eager(ours, eager, exact):
    """Weights and moments: no further from float64 than eager float32 is, within a small factor."""
    for result, other, truth in zip(ours[3:], eager[3:], exact[3:], strict=True):
        error, allowed = ((x.cpu().double() - truth).abs() for x in (result, other))
        assert error.max() <= 5 * allowed.max()
        assert error.mean() <= 3 * allowed.mean()


def test_reference_follows_autograd_and_torch_adam():
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
        loss = qk_adam(tokens, directions, targets, wq, wk, moments, **ARGUMENTS, first_step=step, steps=1)
        torch.testing.assert_close(loss, errors.detach())
    torch.testing.assert_close(wq, q.detach())
    torch.testing.assert_close(wk, k.detach())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"n": 256, "basis": 31, "dim": 512, "rank": 64, "heads": 8},
        {"n": 1024, "heads": 2},
        {"n": 3001, "heads": 1},  # tiles of the map in global memory
    ],
)
def test_cuda_matches_float64_and_itself(shape):
    exact, eager = problem(**shape, dtype=torch.float64), problem(**shape)
    results = [problem(**shape, device="cuda") for _ in range(2)]
    for first_step, steps in ((0, 1), (1, 4)):
        expected = qk_adam_reference(*exact, *ARGUMENTS.values(), first_step, steps)
        qk_adam_reference(*eager, *ARGUMENTS.values(), first_step, steps)
        for ours in results:
            loss = qk_adam(*ours, **ARGUMENTS, first_step=first_step, steps=steps)
            torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    check_as_close_as_eager(results[0], eager, exact)


@pytest.mark.gpu
def test_cuda_graph_and_stream():
    expected, on_stream, captured = (problem(n=1024, device="cuda") for _ in range(3))
    first_weights = [x.clone() for x in captured[3:]]
    arguments = {**ARGUMENTS, "first_step": 0, "steps": 3}
    loss = qk_adam(*expected, **arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loss_on_stream = qk_adam(*on_stream, **arguments)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(
        torch.equal(a, b) for a, b in zip((loss_on_stream, *on_stream), (loss, *expected), strict=True)
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_loss = qk_adam(*captured, **arguments)
    qk_adam(*problem(device="cuda"), **arguments)  # needs less shared memory: the graph's stays as it was
    for _ in range(2):
        for x, first in zip(captured[3:], first_weights, strict=True):
            x.copy_(first)
        graph.replay()
        assert all(
            torch.equal(a, b) for a, b in zip((captured_loss, *captured), (loss, *expected), strict=True)
        )


@devices
def test_no_heads_and_no_steps(device):
    inputs = problem(heads=0, device=device)
    assert qk_adam(*inputs, **ARGUMENTS, first_step=0, steps=3).shape == (0,)
    inputs = problem(device=device)
    before = [x.clone() for x in inputs]
    assert torch.equal(qk_adam(*inputs, **ARGUMENTS, first_step=0, steps=0).cpu(), torch.zeros(3))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@devices
@pytest.mark.parametrize("target", [-2, 35, 2**32])
def test_targets_outside_are_refused_or_give_nan(target, device):
    inputs = problem(device=device)
    inputs[2][1, 3] = target
    if device == "cpu":
        with pytest.raises(ValueError, match=r"targets must lie in \[-1, 35\)"):
            qk_adam(*inputs, **ARGUMENTS, first_step=0, steps=2)
        return
    loss = qk_adam(*inputs, **ARGUMENTS, first_step=0, steps=2)
    for result in (loss, inputs[3], inputs[4]):
        assert result[[0, 2]].isfinite().all()
        assert result[1].isnan().all()


@devices
def test_opcheck(device):
    inputs = problem(n=9, basis=4, dim=6, rank=2, device=device)
    torch.library.opcheck(torch.ops.convinit.qk_adam.default, (*inputs, *ARGUMENTS.values(), 0, 2))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.__setitem__(0, a[0].double()),
        lambda a: a.__setitem__(1, a[1][:, 1:]),
        lambda a: a.__setitem__(2, a[2].int()),
        lambda a: a.__setitem__(3, a[3].mT.contiguous().mT),
        lambda a: a.__setitem__(4, a[4].cpu()),
        lambda a: a.__setitem__(5, a[5][:1]),
    ],
)
def test_direct_calls_with_bad_arguments_are_refused(change):
    arguments = [*problem(device="cuda"), *ARGUMENTS.values(), 0, 1]
    change(arguments)
    with pytest.raises(RuntimeError, match="convinit"):
        torch.ops.convinit.qk_adam(*arguments)
