"""Many calls, many threads and many processes; run before a release."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import convinit
from convinit.fit import newton
from convinit.nn import sincos_2d

pytestmark = pytest.mark.slow


def work(seed: int) -> bytes:
    """One of everything that is compiled."""
    generator = torch.Generator().manual_seed(seed)
    offsets = convinit.sample_offsets(6, 3, generator=generator)
    fit = convinit.fit_qk(sincos_2d((6, 6), 32), offsets, (6, 6), 8, scale=0.35, generator=generator)
    q, k, v = torch.randn(3, 4, 2, 144, 32, generator=generator)  # large enough for the kernels
    x = torch.randn(2, 6, 9, 9, generator=generator, requires_grad=True)
    results = [
        fit.wq,
        convinit.positional_attention(q, k, v, backend="native"),
        convinit.shared_attention(q[0], k[0], v, backend="native"),
        convinit.impulse_matrix(offsets, (6, 6)),
        *torch.autograd.grad(convinit.impulse_conv(x, offsets).square().sum(), x),
    ]
    return b"".join(t.detach().numpy().tobytes() for t in results)


def test_ctrl_c_ends_a_fit_that_takes_minutes(monkeypatch):
    monitors, solve = [], newton.qk_solver

    def watched(*arguments, monitor, **options):
        def interrupt():
            while monitor[2] == 0:  # evaluations: the solver is at work
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        monitors.append(monitor)
        threading.Thread(target=interrupt, daemon=True).start()
        return solve(*arguments, monitor=monitor, **options)

    monkeypatch.setattr(newton, "qk_solver", watched)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        P, offsets = torch.randn(3600, 384), torch.randint(-3, 4, (6, 2))
        with pytest.raises(KeyboardInterrupt):
            convinit.fit_qk(P, offsets, (60, 60), 64, scale=0.125)
    finally:
        signal.signal(signal.SIGINT, before)
    (monitor,) = monitors
    assert monitor[1] == 0 and monitor[2] < 50  # of some hundreds for each problem


@pytest.mark.parametrize("threads", [1, 2])
def test_eight_threads_get_the_same_bits(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = [work(seed) for seed in range(3)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(work, list(range(3)) * 40))
        assert found == expected * 40
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_child_processes_get_the_same_bits(method):
    """With one torch thread: a fork beside OpenMP's threads waits for them, in plain PyTorch too."""
    code = f"""
import multiprocessing, torch
from test_endurance import work

if __name__ == "__main__":
    torch.set_num_threads(1)
    expected = [work(seed) for seed in range(4)]
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        assert pool.map_async(work, range(4)).get(timeout=240) == expected
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    script = [sys.executable, "-c", code]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_hundred_thousand_calls_leave_memory_flat():
    q, x = torch.randn(1, 2, 8, 4), torch.randn(1, 2, 5, 5)
    offsets = torch.tensor([[0, 1], [1, 0]])

    def refused():
        with pytest.raises(ValueError):
            convinit.impulse_conv(x, offsets[:1])

    calls = [
        lambda: convinit.positional_attention(q, q, q, backend="native"),
        lambda: convinit.shared_attention(q[0], q[0], q, backend="native"),
        lambda: convinit.impulse_conv(x, offsets),
        lambda: convinit.impulse_matrix(offsets, (3, 3)),
        refused,
    ]

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    sizes = []
    for _ in range(2):
        for _ in range(10_000):
            for call in calls:
                call()
        sizes.append(resident())
    assert sizes[1] - sizes[0] < 4 * 2**20
