"""Positional attention: one kernel forward, and for each of two lengths a way back.

    Q = α q + q_pos            [N, R]     (one head of one image; q itself without q_pos, K likewise)
    K = α k + k_pos            [N, R]
    S = scale · Q Kᵀ           [N, N]     lse = log₂ Σ_m 2^(S log₂e)     [N]
    P = softmax(S)             [N, N]
    O = P V                    [N, R]

    dV = Pᵀ dO                            dP = dO Vᵀ        delta = rowsum(dO ∘ O)
    dS = P ∘ (dP − delta)                 dQ = scale · dS K               dK = scale · dSᵀ Q
    dq = α dQ                             dq_pos = Σ_images dQ            (k likewise)

S never leaves the chip. Logits are in base 2: log₂e is part of the scale, and 2^x is one instruction.
The position terms' gradients are sums of the finished dq and dk over the images, in a kernel of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from convinit.kernels.tiles import head, load_mixed, load_row, load_tile, store_row, store_tile

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend(
    b_q, b_k, b_v, o_n, b_max, b_sum, b_out, c, N, WHOLE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Queries look at the keys o_n: a row's maximum, sum and output so far; None before its first keys."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
    if not WHOLE:
        b_s = tl.where((o_n < N)[None, :], b_s, float("-inf"))
    b_new = tl.max(b_s, 1) * c  # [BM]
    if b_max is not None:
        b_new = tl.maximum(b_max, b_new)
    b_p = tl.exp2(b_s * c - b_new[:, None])  # [BM, BN]; one FFMA and one EX2 each
    if b_max is None:
        b_sum = tl.sum(b_p, 1)  # [BM]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)  # [BM, BR]
    else:
        b_rescale = tl.exp2(b_max - b_new)  # [BM]
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, acc=b_out * b_rescale[:, None], input_precision=PRECISION)
    return b_new, b_sum, b_out


@triton.jit(do_not_specialize=["heads", "programs"])
def forward_kernel(
    p_q,
    p_k,
    p_v,
    p_q_pos,  # None: no position term
    p_k_pos,
    p_out,
    p_lse,  # [B, heads, N]
    stride_q,
    stride_k,
    stride_v,
    stride_q_pos,
    stride_k_pos,
    stride_out,
    heads,
    programs,
    N,
    scale,  # not negative
    alpha,
    R: tl.constexpr,
    BM: tl.constexpr,  # queries a step
    BN: tl.constexpr,  # keys a step, where they come tile by tile
    BR: tl.constexpr,  # R rounded up to a power of two
    BLOCKS: tl.constexpr,  # sizes of the blocks of keys that stay on chip; (): they come tile by tile
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (B · heads · programs,): neighbours share a head, then an image, and with them the L2 cache.

    Where all keys fit, K and V are read and mixed once and stay while the queries pass by. They lie in blocks
    of several sizes, so that little is padded: 128 + 64 + 16 keys for N = 197. Otherwise a program has a tile
    of queries, and the keys come tile by tile.
    """
    i_bh = tl.program_id(0) // programs
    i_b = i_bh // heads
    i_h = i_bh % heads
    i_first = (tl.program_id(0) % programs) * BM
    o_r = tl.arange(0, BR)
    p_out = head(p_out, stride_out, i_b, i_h)
    p_v = head(p_v, stride_v, i_b, i_h)
    p_lse += i_bh.to(tl.int64) * N
    c = scale * LOG2E
    if len(BLOCKS) > 0:
        o_ns = ()
        b_ks = ()
        b_vs = ()
        i_n = 0
        for i in tl.static_range(len(BLOCKS)):
            o_n = i_n + tl.arange(0, BLOCKS[i])
            # Only the last block reaches beyond N; a padded R needs its mask everywhere.
            b_k = load_mixed(
                p_k, stride_k, p_k_pos, stride_k_pos, i_b, i_h, o_n, o_r, alpha, N, R,
                WHOLE or R == BR and i + 1 < len(BLOCKS),
            )  # fmt: skip
            b_v = load_tile(p_v, stride_v, o_n, o_r, N, R, WHOLE or R == BR and i + 1 < len(BLOCKS))
            o_ns += (o_n,)  # type: ignore[assignment]
            b_ks += (b_k,)  # type: ignore[assignment] # [BLOCKS[i], BR]
            b_vs += (b_v,)  # type: ignore[assignment]
            i_n += BLOCKS[i]
        for i_m in range(i_first, N, BM * programs):
            o_m = i_m + tl.arange(0, BM)
            b_q = load_mixed(p_q, stride_q, p_q_pos, stride_q_pos, i_b, i_h, o_m, o_r, alpha, N, R, WHOLE)
            b_max, b_sum, b_out = attend(
                b_q, b_ks[0], b_vs[0], o_ns[0], None, None, None, c, N,  # type: ignore[misc]
                WHOLE or len(BLOCKS) > 1, PRECISION,
            )  # fmt: skip
            for i in tl.static_range(1, len(BLOCKS)):
                b_max, b_sum, b_out = attend(
                    b_q, b_ks[i], b_vs[i], o_ns[i], b_max, b_sum, b_out, c, N,
                    WHOLE or i + 1 < len(BLOCKS), PRECISION,
                )  # fmt: skip
            store_tile(p_out, stride_out, o_m, o_r, b_out * (1 / b_sum)[:, None], N, R, WHOLE)
            store_row(p_lse, o_m, b_max + tl.log2(b_sum), N, WHOLE)
    else:
        o_m = i_first + tl.arange(0, BM)
        b_q = load_mixed(
            p_q, stride_q, p_q_pos, stride_q_pos, i_b, i_h, o_m, o_r, alpha, N, R, WHOLE
        )  # [BM, BR]
        b_max = tl.full([BM], float("-inf"), tl.float32)
        b_sum = tl.zeros([BM], tl.float32)
        b_out = tl.zeros([BM, BR], tl.float32)
        for i_n in range(0, N, BN):
            o_n = i_n + tl.arange(0, BN)
            b_k = load_mixed(p_k, stride_k, p_k_pos, stride_k_pos, i_b, i_h, o_n, o_r, alpha, N, R, WHOLE)
            b_v = load_tile(p_v, stride_v, o_n, o_r, N, R, WHOLE)
            b_max, b_sum, b_out = attend(b_q, b_k, b_v, o_n, b_max, b_sum, b_out, c, N, WHOLE, PRECISION)
        store_tile(p_out, stride_out, o_m, o_r, b_out * (1 / b_sum)[:, None], N, R, WHOLE)
        store_row(p_lse, o_m, b_max + tl.log2(b_sum), N, WHOLE)


@triton.jit(do_not_specialize=["heads"])
def backward_kernel(
    p_q,
    p_k,
    p_v,
    p_q_pos,
    p_k_pos,
    p_out,
    p_dout,
    p_lse,
    p_dq,  # None: nobody asked for this gradient
    p_dk,
    p_dv,
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
    heads,
    N,
    scale,
    alpha,
    dq_scale,  # dq = dq_scale · dS K
    dk_scale,
    R: tl.constexpr,
    BM: tl.constexpr,  # queries a step
    BN: tl.constexpr,  # >= N
    BR: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All keys at once: grid (B · heads,).

    K and V stay on chip and dK and dV in registers while the queries pass by, so everything is read once and
    dQ is complete at once. [N, N] is held transposed, keys down: P and dS enter the products of dV and dK as
    they are, and dQᵀ = Kᵀ dS, whose R rows are enough for Hopper's wgmma where the BM rows of dQ are not.
    """
    i_bh = tl.program_id(0)
    i_b = i_bh // heads
    i_h = i_bh % heads
    o_r = tl.arange(0, BR)
    o_n = tl.arange(0, BN)
    p_lse += i_bh.to(tl.int64) * N
    b_k = load_mixed(p_k, stride_k, p_k_pos, stride_k_pos, i_b, i_h, o_n, o_r, alpha, N, R, WHOLE)  # [BN, BR]
    b_v = load_tile(head(p_v, stride_v, i_b, i_h), stride_v, o_n, o_r, N, R, WHOLE)  # [BN, BR]
    b_dk = tl.zeros([BN, BR], tl.float32)
    b_dv = tl.zeros([BN, BR], tl.float32)
    for i_m in range(0, N, BM):
        o_m = i_m + tl.arange(0, BM)
        b_q = load_mixed(
            p_q, stride_q, p_q_pos, stride_q_pos, i_b, i_h, o_m, o_r, alpha, N, R, WHOLE
        )  # [BM, BR]
        b_do = load_tile(head(p_dout, stride_dout, i_b, i_h), stride_dout, o_m, o_r, N, R, WHOLE)  # [BM, BR]
        b_out = load_tile(head(p_out, stride_out, i_b, i_h), stride_out, o_m, o_r, N, R, WHOLE)  # [BM, BR]
        b_lse = load_row(p_lse, o_m, N, float("inf"), WHOLE)  # [BM]
        b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)  # [BM]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
        b_p = tl.exp2(b_s * (scale * LOG2E) - b_lse[None, :])  # [BN, BM]
        if not WHOLE:
            b_p = tl.where((o_n < N)[:, None], b_p, 0.0)  # 2^(0 − lse) may overflow there
        if p_dv is not None:
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, acc=b_dv, input_precision=PRECISION)
        if p_dq is not None or p_dk is not None:
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [BN, BM]
            b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)  # [BN, BM]
            if p_dk is not None:
                b_dk = tl.dot(b_ds, b_q, acc=b_dk, input_precision=PRECISION)
            if p_dq is not None:
                b_dq = tl.trans(tl.dot(tl.trans(b_k), b_ds, input_precision=PRECISION) * dq_scale)  # [BM, BR]
                store_tile(head(p_dq, stride_dq, i_b, i_h), stride_dq, o_m, o_r, b_dq, N, R, WHOLE)
    if p_dv is not None:
        store_tile(head(p_dv, stride_dv, i_b, i_h), stride_dv, o_n, o_r, b_dv, N, R, WHOLE)
    if p_dk is not None:
        store_tile(head(p_dk, stride_dk, i_b, i_h), stride_dk, o_n, o_r, b_dk * dk_scale, N, R, WHOLE)


@triton.jit(do_not_specialize=["heads"])
def backward_queries_kernel(
    p_q,
    p_k,
    p_v,
    p_q_pos,
    p_k_pos,
    p_out,
    p_dout,
    p_lse,
    p_delta,  # [B, heads, N] float32, written: the kernel below reads it
    p_dq,  # None: delta alone
    stride_q,
    stride_k,
    stride_v,
    stride_q_pos,
    stride_k_pos,
    stride_out,
    stride_dout,
    stride_dq,
    heads,
    N,
    scale,
    alpha,
    dq_scale,
    R: tl.constexpr,
    BM: tl.constexpr,  # queries of a program
    BN: tl.constexpr,  # keys a step
    BR: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """For more keys than fit: dQ and delta of one tile of queries, while the keys pass by.

    Grid (B · heads · tiles of queries,). The map is made twice, here and for dK and dV: seven products in
    place of five, but nothing is added up in memory and no program waits for another.
    """
    tiles = tl.cdiv(N, BM)
    i_bh = tl.program_id(0) // tiles
    i_b = i_bh // heads
    i_h = i_bh % heads
    o_r = tl.arange(0, BR)
    o_m = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    i_rows = i_bh.to(tl.int64) * N
    b_do = load_tile(head(p_dout, stride_dout, i_b, i_h), stride_dout, o_m, o_r, N, R, WHOLE)  # [BM, BR]
    b_out = load_tile(head(p_out, stride_out, i_b, i_h), stride_out, o_m, o_r, N, R, WHOLE)  # [BM, BR]
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)  # [BM]
    store_row(p_delta + i_rows, o_m, b_delta, N, WHOLE)
    if p_dq is not None:
        b_q = load_mixed(
            p_q, stride_q, p_q_pos, stride_q_pos, i_b, i_h, o_m, o_r, alpha, N, R, WHOLE
        )  # [BM, BR]
        b_lse = load_row(p_lse + i_rows, o_m, N, float("inf"), WHOLE)  # [BM]
        b_dq = tl.zeros([BM, BR], tl.float32)
        for i_n in range(0, N, BN):
            o_n = i_n + tl.arange(0, BN)
            b_k = load_mixed(p_k, stride_k, p_k_pos, stride_k_pos, i_b, i_h, o_n, o_r, alpha, N, R, WHOLE)
            b_v = load_tile(head(p_v, stride_v, i_b, i_h), stride_v, o_n, o_r, N, R, WHOLE)  # [BN, BR]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)  # [BM, BN]
            b_p = tl.exp2(b_s * (scale * LOG2E) - b_lse[:, None])  # [BM, BN]
            if not WHOLE:
                b_p = tl.where((o_n < N)[None, :], b_p, 0.0)
            b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_q.dtype)  # [BM, BN]
            b_dq = tl.dot(b_ds, b_k, acc=b_dq, input_precision=PRECISION)
        store_tile(head(p_dq, stride_dq, i_b, i_h), stride_dq, o_m, o_r, b_dq * dq_scale, N, R, WHOLE)


@triton.jit(do_not_specialize=["heads"])
def backward_keys_kernel(
    p_q,
    p_k,
    p_v,
    p_q_pos,
    p_k_pos,
    p_dout,
    p_lse,
    p_delta,
    p_dk,
    p_dv,
    stride_q,
    stride_k,
    stride_v,
    stride_q_pos,
    stride_k_pos,
    stride_dout,
    stride_dk,
    stride_dv,
    heads,
    N,
    scale,
    alpha,
    dk_scale,
    R: tl.constexpr,
    BM: tl.constexpr,  # queries a step
    BN: tl.constexpr,  # keys of a program
    BR: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """For more keys than fit: dK and dV of one tile of keys, while the queries pass by.

    Grid (B · heads · tiles of keys,). [N, N] is held transposed, keys down, as above. What a padded key gets
    is never stored, and a padded query has P = 0 by its lse of infinity: nothing needs a mask.
    """
    tiles = tl.cdiv(N, BN)
    i_bh = tl.program_id(0) // tiles
    i_b = i_bh // heads
    i_h = i_bh % heads
    o_r = tl.arange(0, BR)
    o_n = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    i_rows = i_bh.to(tl.int64) * N
    b_k = load_mixed(p_k, stride_k, p_k_pos, stride_k_pos, i_b, i_h, o_n, o_r, alpha, N, R, WHOLE)  # [BN, BR]
    b_v = load_tile(head(p_v, stride_v, i_b, i_h), stride_v, o_n, o_r, N, R, WHOLE)  # [BN, BR]
    b_dk = tl.zeros([BN, BR], tl.float32)
    b_dv = tl.zeros([BN, BR], tl.float32)
    for i_m in range(0, N, BM):
        o_m = i_m + tl.arange(0, BM)
        b_q = load_mixed(
            p_q, stride_q, p_q_pos, stride_q_pos, i_b, i_h, o_m, o_r, alpha, N, R, WHOLE
        )  # [BM, BR]
        b_do = load_tile(head(p_dout, stride_dout, i_b, i_h), stride_dout, o_m, o_r, N, R, WHOLE)  # [BM, BR]
        b_lse = load_row(p_lse + i_rows, o_m, N, float("inf"), WHOLE)  # [BM]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
        b_p = tl.exp2(b_s * (scale * LOG2E) - b_lse[None, :])  # [BN, BM]
        if p_dv is not None:
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, acc=b_dv, input_precision=PRECISION)
        if p_dk is not None:
            b_delta = load_row(p_delta + i_rows, o_m, N, 0.0, WHOLE)  # [BM]
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [BN, BM]
            b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)  # [BN, BM]
            b_dk = tl.dot(b_ds, b_q, acc=b_dk, input_precision=PRECISION)
    if p_dv is not None:
        store_tile(head(p_dv, stride_dv, i_b, i_h), stride_dv, o_n, o_r, b_dv, N, R, WHOLE)
    if p_dk is not None:
        store_tile(head(p_dk, stride_dk, i_b, i_h), stride_dk, o_n, o_r, b_dk * dk_scale, N, R, WHOLE)


@triton.jit(do_not_specialize=["B", "heads"])
def sum_images_kernel(
    p_dq,  # [B, heads, N, R]
    p_dk,
    p_dq_pos,  # [heads, N, R]
    p_dk_pos,
    stride_dq,
    stride_dk,
    B,
    heads,
    N,
    dq_pos_scale,
    dk_pos_scale,
    R: tl.constexpr,
    BB: tl.constexpr,  # images a step
    BE: tl.constexpr,  # elements of a program
):
    """dq_pos = dq_pos_scale · Σ_images dq, and the same of k: grid (heads · N · R / BE, 2).

    Elements are counted as they lie in memory, (token, head, channel), so that neighbours read neighbours.
    """
    o_e = tl.program_id(0) * BE + tl.arange(0, BE)
    if tl.program_id(1) == 0:
        if p_dq_pos is not None:
            sum_images(p_dq, p_dq_pos, stride_dq, B, heads, N, dq_pos_scale, R, o_e, BB, BE)
    else:
        if p_dk_pos is not None:
            sum_images(p_dk, p_dk_pos, stride_dk, B, heads, N, dk_pos_scale, R, o_e, BB, BE)


@triton.jit
def sum_images(
    p_x, p_sum, stride, B, heads, N, scale, R: tl.constexpr, o_e, BB: tl.constexpr, BE: tl.constexpr
):
    o_r = o_e % R
    o_h = o_e // R % heads
    o_n = o_e // (R * heads)
    m_e = o_n < N
    p_x += o_h.to(tl.int64) * stride[1] + o_n.to(tl.int64) * stride[2] + o_r * stride[3]  # [BE]
    b_sum = tl.zeros([BB, BE], tl.float32)
    for i_b in range(0, B, BB):
        o_b = i_b + tl.arange(0, BB)
        p_tile = p_x[None, :] + o_b.to(tl.int64)[:, None] * stride[0]
        b_sum += tl.load(p_tile, mask=(o_b < B)[:, None] & m_e[None, :], other=0.0).to(tl.float32)
    b_total = tl.sum(b_sum, 0) * scale
    p_out = p_sum + (o_h * N + o_n) * R + o_r
    tl.store(p_out, b_total.to(p_sum.dtype.element_ty), mask=m_e)
