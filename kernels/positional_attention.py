"""Positional attention, one kernel a direction.

    Q = α q + q_pos            [N, R]     (one head of one image; q itself without q_pos, K likewise)
    K = α k + k_pos            [N, R]
    S = scale · Q Kᵀ           [N, N]     lse = log₂ Σ_m 2^(S log₂e)     [N]
    P = softmax(S)             [N, N]
    O = P V                    [N, R]

    dV = Pᵀ dO                            dP = dO Vᵀ        delta = rowsum(dO ∘ O)
    dS = P ∘ (dP − delta)                 dQ = scale · dS K               dK = scale · dSᵀ Q
    dq = α dQ                             dq_pos = Σ_images dQ            (k likewise)

With dropout D ∘ P stands for P in O and dV, and D ∘ dP for dP, where D is 0 or 1/(1−p). delta stays as it is.

S never leaves the chip. Logits are in base 2: log₂e is part of the scale, and 2^x is one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from convinit.kernels.tiles import dropout_factor, head, load_mixed, load_tile, store_tile

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def forward_kernel(
    p_q,
    p_k,
    p_v,
    p_q_pos,  # None: no position term
    p_k_pos,
    p_out,
    p_lse,  # [B, heads, N]
    p_seed,  # None: no dropout
    stride_q,
    stride_k,
    stride_v,
    stride_q_pos,
    stride_k_pos,
    stride_out,
    heads,
    N,
    scale,
    alpha,
    dropout_p,
    R: tl.constexpr,
    BM: tl.constexpr,  # queries a step
    BN: tl.constexpr,  # keys a step
    BR: tl.constexpr,  # R rounded up to a power of two
    ALL_KEYS: tl.constexpr,  # BN >= N
    PRECISION: tl.constexpr,
):
    """Grid (B · heads, programs a head). Heads run fastest: they are neighbours in a packed product.

    Where all keys fit, K and V are read and mixed once and stay while the queries pass by, and a row's
    maximum is final once it is seen. Otherwise keys come tile by tile, and what a row has is rescaled
    when its maximum grows.
    """
    i_bh = tl.program_id(0)
    i_b = i_bh // heads
    i_h = i_bh % heads
    o_r = tl.arange(0, BR)
    if ALL_KEYS:
        o_n = tl.arange(0, BN)
        b_k = load_mixed(p_k, stride_k, p_k_pos, stride_k_pos, i_b, i_h, o_n, o_r, alpha, N, R)  # [BN, BR]
        b_v = load_tile(head(p_v, stride_v, i_b, i_h), stride_v, o_n, o_r, N, R)  # [BN, BR]

    for i_m in range(tl.program_id(1), tl.cdiv(N, BM), tl.num_programs(1)):
        o_m = i_m * BM + tl.arange(0, BM)
        b_q = load_mixed(p_q, stride_q, p_q_pos, stride_q_pos, i_b, i_h, o_m, o_r, alpha, N, R)  # [BM, BR]
        if ALL_KEYS:
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2E)  # [BM, BN]
            b_s = tl.where((o_n < N)[None, :], b_s, float("-inf"))
            b_max = tl.max(b_s, 1)  # [BM]
            b_p = tl.exp2(b_s - b_max[:, None])  # [BM, BN]
            b_sum = tl.sum(b_p, 1)  # [BM]
            if p_seed is not None:
                b_p *= dropout_factor(p_seed, i_bh, o_m[:, None], o_n[None, :], N, dropout_p)
            b_out = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)  # [BM, BR]
        else:
            b_max = tl.full([BM], float("-inf"), tl.float32)
            b_sum = tl.zeros([BM], tl.float32)
            b_out = tl.zeros([BM, BR], tl.float32)
            for i_n in range(0, N, BN):
                o_n = i_n + tl.arange(0, BN)
                b_k = load_mixed(p_k, stride_k, p_k_pos, stride_k_pos, i_b, i_h, o_n, o_r, alpha, N, R)
                b_v = load_tile(head(p_v, stride_v, i_b, i_h), stride_v, o_n, o_r, N, R)
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2E)  # [BM, BN]
                b_s = tl.where((o_n < N)[None, :], b_s, float("-inf"))
                b_new = tl.maximum(b_max, tl.max(b_s, 1))  # [BM]
                b_p = tl.exp2(b_s - b_new[:, None])  # [BM, BN]
                b_rescale = tl.exp2(b_max - b_new)  # [BM]; 0 at the first tile
                b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
                if p_seed is not None:
                    b_p *= dropout_factor(p_seed, i_bh, o_m[:, None], o_n[None, :], N, dropout_p)
                b_out *= b_rescale[:, None]
                b_out = tl.dot(b_p.to(b_v.dtype), b_v, acc=b_out, input_precision=PRECISION)
                b_max = b_new
        b_out /= b_sum[:, None]
        store_tile(head(p_out, stride_out, i_b, i_h), stride_out, o_m, o_r, b_out, N, R)
        tl.store(p_lse + i_bh.to(tl.int64) * N + o_m, b_max + tl.log2(b_sum), mask=o_m < N)


@triton.jit
def backward_kernel(
    p_q,
    p_k,
    p_v,
    p_q_pos,
    p_k_pos,
    p_out,
    p_dout,
    p_lse,
    p_seed,
    p_dq,  # None: nobody asked for this gradient
    p_dk,
    p_dv,
    p_dq_part,  # [splits, heads, N, R] float32: dQ of the image at hand, over the keys seen so far
    p_dq_pos,  # [splits, heads, N, R] float32: dQ, summed over the images of a split
    p_dk_pos,
    stride_q,
    stride_k,
    stride_v,
    stride_q_pos,
    stride_k_pos,
    stride_out,
    stride_dout,
    stride_dq,
    stride_dk,
    stride_dv,
    stride_split,  # of the three buffers above
    B,
    heads,
    N,
    scale,
    alpha,
    dropout_p,
    R: tl.constexpr,
    BM: tl.constexpr,  # queries a step
    BN: tl.constexpr,  # keys a step
    BR: tl.constexpr,
    ALL_KEYS: tl.constexpr,  # BN >= N
    PRECISION: tl.constexpr,
):
    """Grid (heads · splits,). A program takes every splits-th image of one head, one after the other.

    A tile of keys stays while the queries pass by, so dK and dV are complete when the last query has passed.
    dQ is complete at once where all keys fit. Where not, its parts are added up in a buffer that the program
    owns. So are dq_pos and dk_pos: the registers are taken by dK and dV. The buffers of all programs together
    are a few megabytes and stay in the L2 cache; nothing is atomic, and there is one order of addition.

    Everything [N, N] is held transposed, keys down: P and dS enter the products of dV and dK as they are.
    """
    NEED_Q: tl.constexpr = p_dq is not None or p_dq_pos is not None
    NEED_K: tl.constexpr = p_dk is not None or p_dk_pos is not None
    NEED_V: tl.constexpr = p_dv is not None
    i_h = tl.program_id(0) % heads
    i_split = tl.program_id(0) // heads
    splits = tl.num_programs(0) // heads
    o_r = tl.arange(0, BR)

    for i_b in range(i_split, B, splits):
        i_bh = i_b * heads + i_h
        first_image = i_b == i_split
        for i_n in range(0, N, BN):
            o_n = i_n + tl.arange(0, BN)
            b_k = load_mixed(p_k, stride_k, p_k_pos, stride_k_pos, i_b, i_h, o_n, o_r, alpha, N, R)
            b_v = load_tile(head(p_v, stride_v, i_b, i_h), stride_v, o_n, o_r, N, R)  # [BN, BR]
            b_dk = tl.zeros([BN, BR], tl.float32)
            b_dv = tl.zeros([BN, BR], tl.float32)

            for i_m in range(0, N, BM):
                o_m = i_m + tl.arange(0, BM)
                b_q = load_mixed(p_q, stride_q, p_q_pos, stride_q_pos, i_b, i_h, o_m, o_r, alpha, N, R)
                b_do = load_tile(head(p_dout, stride_dout, i_b, i_h), stride_dout, o_m, o_r, N, R)  # [BM, BR]
                b_lse = tl.load(p_lse + i_bh.to(tl.int64) * N + o_m, mask=o_m < N, other=float("inf"))  # [BM]
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * (scale * LOG2E)  # [BN, BM]
                # Keys of padding are masked: 2^(0 - lse) may overflow there.
                b_p = tl.where((o_n < N)[:, None], tl.exp2(b_s - b_lse[None, :]), 0.0)  # [BN, BM]
                if p_seed is not None:
                    b_drop = dropout_factor(p_seed, i_bh, o_m[None, :], o_n[:, None], N, dropout_p)
                if NEED_V:
                    b_pd = b_p * b_drop if p_seed is not None else b_p
                    b_dv = tl.dot(b_pd.to(b_do.dtype), b_do, acc=b_dv, input_precision=PRECISION)
                if NEED_Q or NEED_K:
                    b_out = load_tile(head(p_out, stride_out, i_b, i_h), stride_out, o_m, o_r, N, R)
                    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)  # [BM]
                    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [BN, BM]
                    if p_seed is not None:
                        b_dp *= b_drop
                    b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)  # [BN, BM]
                    if NEED_K:
                        b_dk = tl.dot(b_ds, b_q, acc=b_dk, input_precision=PRECISION)
                    if NEED_Q:
                        b_dq = tl.dot(tl.trans(b_ds), b_k, input_precision=PRECISION) * scale  # [BM, BR]
                        if not ALL_KEYS:
                            first_keys = i_n == 0
                            b_dq = add_to(
                                p_dq_part, stride_split, i_split, i_h, o_m, o_r, b_dq, first_keys, N, R
                            )
                        complete = tl.where(i_n + BN >= N, N, 0)  # rows of dQ to store: all, at the last keys
                        if p_dq is not None:
                            b_x = b_dq * alpha if p_q_pos is not None else b_dq
                            store_tile(head(p_dq, stride_dq, i_b, i_h), stride_dq, o_m, o_r, b_x, complete, R)
                        if p_dq_pos is not None:
                            add_to(
                                p_dq_pos, stride_split, i_split, i_h, o_m, o_r, b_dq, first_image, complete, R
                            )

            if NEED_V:
                store_tile(head(p_dv, stride_dv, i_b, i_h), stride_dv, o_n, o_r, b_dv, N, R)
            if NEED_K:
                b_dk *= scale
                if p_dk is not None:
                    b_x = b_dk * alpha if p_k_pos is not None else b_dk
                    store_tile(head(p_dk, stride_dk, i_b, i_h), stride_dk, o_n, o_r, b_x, N, R)
                if p_dk_pos is not None:
                    add_to(p_dk_pos, stride_split, i_split, i_h, o_n, o_r, b_dk, first_image, N, R)
            if p_dq_part is not None or p_dq_pos is not None or p_dk_pos is not None:
                tl.debug_barrier()  # the next step's threads may read what other threads added here


@triton.jit
def add_to(p_sum, stride, i_split, i_h, o_row, o_r, b_x, first, rows, R):
    """Add b_x to this program's part of a sum, which is 0 at first, and return the new part."""
    p_sum = head(p_sum, stride, i_split, i_h)
    b_x += load_tile(p_sum, stride, o_row, o_r, tl.where(first, 0, rows), R)
    store_tile(p_sum, stride, o_row, o_r, b_x, rows, R)
    return b_x
