from __future__ import annotations

import pytest
import torch

from convinit.fit.newton import reduced_bases, ridge_starts
from convinit.fit.result import attention_maps, map_metrics
from convinit.offsets import impulse_targets
from convinit.ops.qk_solver import DIAGNOSTICS, qk_solver, qk_solver_reference

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def problem(grid_size=(6, 7), dim=24, rank=12, offsets=((0, 1), (-1, 2), (0, 0)), seed=0, device="cpu"):
    """Basis, targets and starts for a random embedding, as the fit makes them."""
    generator = torch.Generator().manual_seed(seed)
    P = torch.randn(grid_size[0] * grid_size[1], dim, dtype=torch.float64, generator=generator)
    (_, xq), (_, xk) = reduced_bases(P)
    targets = impulse_targets(torch.tensor(offsets), grid_size)
    inputs = xq, xk, targets, *ridge_starts(xq, xk, targets, min(rank, xk.shape[1]))
    return tuple(x.to(device) for x in inputs)


def metrics_in_float64(xq, xk, targets, wq, wk, scale):
    logits = scale * (xq @ wq) @ (xk @ wk).mT
    return torch.stack(map_metrics(torch.softmax(logits, -1), targets), dim=1)


def norms(weights, value):
    return torch.full((len(weights[2]),), value, dtype=torch.float64, device=weights[2].device)


@devices
@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0])
def test_reaches_the_optimum_of_the_reference(scale, device):
    inputs = problem(device=device)
    weight_norm = norms(inputs, 1.2 / scale**0.5)
    wq, wk, diagnostics = qk_solver(*inputs, scale=scale, weight_norm=weight_norm, tolerance=1e-4)
    _, _, best = qk_solver_reference(*inputs, scale=scale, weight_norm=weight_norm)
    assert (diagnostics[:, 0] <= 1.02 * best).all()
    for w in (wq, wk):
        torch.testing.assert_close(w.norm(dim=(1, 2)), weight_norm, rtol=1e-10, atol=0)


@devices
@pytest.mark.parametrize("weight_norm", [0.5, 3.0, 8.0])
def test_diagnostics_are_those_of_the_returned_weights(weight_norm, device):
    xq, xk, targets, *starts = problem(device=device)
    targets[0, ::3] = -1
    wq, wk, diagnostics = qk_solver(
        xq, xk, targets, *starts, scale=0.3, weight_norm=norms((0, 0, targets), weight_norm)
    )
    expected = metrics_in_float64(xq, xk, targets, wq, wk, 0.3)
    torch.testing.assert_close(diagnostics[:, :3], expected, rtol=1e-4, atol=1e-9)


@devices
@pytest.mark.parametrize("tokens", [(1, 2), (3, 5), (4, 4), (1, 17), (8, 8), (5, 13), (14, 14)])
def test_value_at_the_start_for_every_size_of_tail(tokens, device):
    """Vector loops and row blocks have tails; no iterations, so that the value is that of a known point."""
    xq, xk, targets, wq, wk = problem(tokens, dim=9, rank=5, offsets=((0, 1), (0, -1)), device=device)
    out_q, out_k, diagnostics = qk_solver(
        xq, xk, targets, wq[:1], wk[:1], scale=0.5, weight_norm=norms((0, 0, targets), 2.0), max_iterations=0
    )
    torch.testing.assert_close(out_q, 2 * wq[0] / wq[0].norm(dim=(1, 2), keepdim=True))
    torch.testing.assert_close(out_k, 2 * wk[0] / wk[0].norm(dim=(1, 2), keepdim=True))
    expected = metrics_in_float64(xq, xk, targets, out_q, out_k, 0.5)
    torch.testing.assert_close(diagnostics[:, :3], expected, rtol=1e-5, atol=1e-9)


@devices
def test_sharp_logits_stay_finite(device):
    inputs = problem(device=device)
    _, _, diagnostics = qk_solver(*inputs, scale=1.0, weight_norm=norms(inputs, 300.0))
    assert diagnostics.isfinite().all()
    assert (diagnostics[:, 1] <= 1).all()


@devices
def test_takes_the_most_promising_start(device):
    xq, xk, targets, wq, wk = problem(device=device)
    noise = torch.randn(wq.shape, dtype=wq.dtype, generator=torch.Generator().manual_seed(1)).to(device)
    arguments = {"scale": 0.3, "weight_norm": norms((0, 0, targets), 3.0), "max_iterations": 0}
    alone = qk_solver(xq, xk, targets, wq[:1], wk[:1], **arguments)
    both = qk_solver(
        xq, xk, targets, torch.cat([noise[:1], wq[:1]]), torch.cat([wk[:1], wk[:1]]), **arguments
    )
    assert torch.equal(alone[0], both[0])


@devices
@pytest.mark.parametrize("peak", [0.2, 0.5, 0.9, 0.99])
def test_meets_a_peak(peak, device):
    inputs = problem(dim=40, rank=20, device=device)
    _, _, diagnostics = qk_solver(*inputs, scale=0.3, peak=peak)
    assert (diagnostics[:, DIAGNOSTICS.index("peak")] - peak).abs().max() < 0.01


def test_result_does_not_depend_on_threads():
    inputs = problem(offsets=tuple((i % 3 - 1, i // 3 - 1) for i in range(9)))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(qk_solver(*inputs, scale=0.3, peak=0.8))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@devices
def test_strided_inputs(device):
    xq, xk, targets, wq, wk = problem(device=device)
    strided = (
        xq.T.contiguous().T, xk.repeat(1, 2)[:, : xk.shape[1]], targets.repeat_interleave(2, 1)[:, ::2],
        wq.mT.contiguous().mT, wk.flip(0).flip(0),
    )  # fmt: skip
    arguments = {"scale": 0.3, "weight_norm": norms((0, 0, targets), 3.0)}
    for a, b in zip(
        qk_solver(xq, xk, targets, wq, wk, **arguments), qk_solver(*strided, **arguments), strict=True
    ):
        assert torch.equal(a, b)


@devices
def test_no_problems(device):
    xq, xk, targets, wq, wk = problem(device=device)
    out = qk_solver(xq, xk, targets[:0], wq[:, :0], wk[:, :0], scale=0.3, peak=0.5)
    assert [list(t.shape) for t in out] == [[0, xq.shape[1], 12], [0, xk.shape[1], 12], [0, 6]]


@devices
def test_opcheck(device):
    inputs = problem(grid_size=(3, 3), rank=4, device=device)
    arguments = (*inputs, 0.3, norms(inputs, 2.0), 0.0, 5, 1e-2)
    torch.library.opcheck(torch.ops.convinit.qk_solver.default, arguments)


@devices
@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.__setitem__(0, a[0].float()),
        lambda a: a.__setitem__(1, a[1][:-1]),
        lambda a: a.__setitem__(2, a[2].int()),
        lambda a: a.__setitem__(3, a[3][:, :, :-1]),
        lambda a: a.__setitem__(4, a[4][:0]),
        lambda a: a.__setitem__(6, None),
        lambda a: a.__setitem__(6, a[6][:1]),
        lambda a: a.__setitem__(7, 0.5),
    ],
)
def test_direct_calls_with_bad_arguments_are_refused(change, device):
    inputs = problem(grid_size=(3, 3), rank=4, device=device)
    arguments = [*inputs, 0.3, norms(inputs, 2.0), 0.0, 5, 1e-2]
    change(arguments)
    with pytest.raises(RuntimeError, match="convinit"):
        torch.ops.convinit.qk_solver(*arguments)


@devices
@pytest.mark.parametrize("target", [-2, 9])
def test_targets_outside_are_refused_or_give_nan(target, device):
    """Looking at them would make the CPU wait for the GPU: there the problem's results are NaN."""
    inputs = problem(grid_size=(3, 3), rank=4, device=device)
    inputs[2][1, 3] = target
    arguments = {"scale": 0.3, "weight_norm": norms(inputs, 2.0)}
    if device == "cpu":
        with pytest.raises(RuntimeError, match="targets"):
            qk_solver(*inputs, **arguments)
        return
    for result in qk_solver(*inputs, **arguments):
        assert result[[0, 2]].isfinite().all()
        assert result[1].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("goal", ["weight_norm", "peak"])
@pytest.mark.parametrize("count", [1, 9, 300])
def test_cuda_matches_the_cpu_and_itself(goal, count):
    """One problem, as many as the GPU takes at once, and more than that."""
    inputs = problem((12, 13), 40, 24, tuple((i % 3 - 1, i // 3 % 3 - 1) for i in range(count)))
    arguments = {"peak": 0.9} if goal == "peak" else {"weight_norm": norms(inputs, 3.5)}
    arguments |= {"scale": 0.3}
    expected = qk_solver(*inputs, **arguments)[2]
    on_gpu = [x.cuda() for x in inputs]
    arguments = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    results = [qk_solver(*on_gpu, **arguments) for _ in range(3)]
    diagnostics = results[0][2].cpu()
    errors = (diagnostics[:, 0] / expected[:, 0] - 1).abs()
    if goal == "weight_norm":
        assert errors.max() < 0.02
    else:  # where the norm moves too, some problems end in another minimum
        assert errors.max() < 0.2 and (count == 1 or errors.median() < 0.05)
    assert (diagnostics[:, 1] - expected[:, 1]).abs().max() < 0.01
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.gpu
def test_cuda_with_tiles_in_global_memory():
    """3,025 tokens are more than any GPU's shared memory takes rows of the map for."""
    inputs = problem((55, 55), offsets=((0, 1), (-1, 2)))
    arguments = {"scale": 0.3, "max_iterations": 3}
    expected = qk_solver(*inputs, **arguments, weight_norm=norms(inputs, 3.5))[2]
    on_gpu = [x.cuda() for x in inputs]
    results = [qk_solver(*on_gpu, **arguments, weight_norm=norms(on_gpu, 3.5)) for _ in range(2)]
    wq, wk, diagnostics = (x.cpu() for x in results[0])
    torch.testing.assert_close(diagnostics[:, :2], expected[:, :2], rtol=1e-3, atol=0)
    truth = metrics_in_float64(*inputs[:3], wq, wk, 0.3)
    torch.testing.assert_close(diagnostics[:, :2], truth[:, :2], rtol=1e-4, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
def test_two_solvers_on_two_streams_at_once():
    """Of unequal sizes: neither may take the other's shared memory, nor wait for blocks that get no place."""
    offsets = tuple((i % 3 - 1, i // 3 - 1) for i in range(9))
    cases = [problem(device="cuda"), problem((28, 29), 40, 24, offsets, device="cuda")]

    def solve(inputs):
        return qk_solver(*inputs, scale=0.3, weight_norm=norms(inputs, 3.0))

    alone, streams = [solve(inputs) for inputs in cases], [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results = []
    for _ in range(5):
        for inputs, stream, expected in zip(cases, streams, alone, strict=True):
            with torch.cuda.stream(stream):
                results.append((solve(inputs), expected))
    torch.cuda.synchronize()
    for result, expected in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.gpu
def test_cuda_graph_and_stream():
    inputs = problem(device="cuda")
    arguments = {"scale": 0.3, "weight_norm": norms(inputs, 3.0)}
    expected = qk_solver(*inputs, **arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = qk_solver(*inputs, **arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = qk_solver(*inputs, **arguments)
    for _ in range(2):
        graph.replay()
        for result in (on_stream, captured):
            assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))


@pytest.mark.gpu
def test_cuda_refuses_tensors_of_another_device():
    inputs = list(problem(device="cuda"))
    inputs[4] = inputs[4].cpu()
    with pytest.raises(RuntimeError, match="wk_starts.*same CUDA device"):
        qk_solver(*inputs, scale=0.3, peak=0.5)


def test_map_metrics_of_known_maps():
    targets = torch.tensor([[1, -1, 0]])
    attention = torch.tensor([[[0.2, 0.7, 0.1], [1 / 3, 1 / 3, 1 / 3], [0.4, 0.4, 0.2]]])
    mse, peak, hit_rate = map_metrics(attention, targets)
    squares = 0.2**2 + 0.3**2 + 0.1**2 + 3 / 9 + 0.6**2 + 0.4**2 + 0.2**2
    torch.testing.assert_close(mse, torch.tensor([squares / 9]))
    torch.testing.assert_close(peak, torch.tensor([0.55]))
    torch.testing.assert_close(hit_rate, torch.tensor([0.5]))  # a tie is no hit
    assert attention_maps(torch.zeros(2, 4, 3), torch.zeros(2, 4, 3), torch.ones(5, 4), 1.0).shape == (
        2,
        5,
        5,
    )
