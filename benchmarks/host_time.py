"""What an attention costs the host in eager mode, in microseconds: a size at which the GPU has nothing to do.

    python benchmarks/host_time.py

Prints one JSON line, {layout backend direction: median of seven loops}, for [2, 3, 196, 64] in bfloat16 with
position terms. "packed" is what our layers call. To compare two revisions, run both on one machine, in turns.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from convinit.ops.positional_attention import packed_attention, positional_attention

BATCH, HEADS, TOKENS, RANK = 2, 3, 196, 64
ALPHA, CALLS, LOOPS = 0.2, 200, 7


def microseconds(call: Callable[[], object]) -> float:
    for _ in range(30):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(LOOPS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
        torch.cuda.synchronize()
    return round(statistics.median(times), 1)


def main() -> None:
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=g, dtype=torch.bfloat16)

    qkv = normal(BATCH, TOKENS, 3 * HEADS * RANK).requires_grad_()
    q_pos, k_pos = (normal(HEADS, TOKENS, RANK).requires_grad_() for _ in range(2))
    dout = normal(BATCH, TOKENS, HEADS * RANK)

    def packed(backend: str) -> Tensor:
        return packed_attention(qkv, HEADS, q_pos, k_pos, alpha=ALPHA, backend=backend)

    def separate(backend: str) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return positional_attention(q, k, v, q_pos, k_pos, alpha=ALPHA, backend=backend)

    rows = {}
    for attention in (packed, separate):
        for backend in ("triton", "sdpa"):

            def both(attention: Callable[[str], Tensor] = attention, backend: str = backend) -> None:
                torch.autograd.grad(attention(backend), (qkv, q_pos, k_pos), dout)

            name = f"{attention.__name__} {backend}"
            with torch.no_grad():
                rows[f"{name} inference"] = microseconds(lambda a=attention, b=backend: a(b))
            rows[f"{name} both ways"] = microseconds(both)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
