"""The products of shared attention: one [N, N] map a head, applied to the values of every image.

    out[b, h] = map[h] · v[b, h]               dv[b, h] = map[h]ᵀ · dout[b, h]
    dmap[h]   = Σ_b dout[b, h] · v[b, h]ᵀ

The softmax that makes the map, and its backward, are [heads, N, N] once a step: PyTorch's own will do.
A program keeps its rows of the map on chip while the images pass by, so v is read and out written once, where
they lie. A map of more than 256 tokens does not stay on chip; launch.py gives it to cuBLAS.
"""

from __future__ import annotations

import triton
import triton.language as tl

from convinit.kernels.tiles import head, load_tile, store_tile


@triton.jit(do_not_specialize=["B", "heads"])
def apply_kernel(
    p_map,
    p_v,
    p_out,
    stride_map,
    stride_v,
    stride_out,
    B,
    heads,
    N,
    R: tl.constexpr,
    BM: tl.constexpr,  # rows of the map
    BN: tl.constexpr,  # >= N
    BR: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = map · v; with the map's row and column strides swapped, dv = mapᵀ · dout.

    Grid (heads · splits, tiles of rows). A program takes every splits-th image, and while it multiplies one
    the next is on its way.
    """
    i_h = tl.program_id(0) % heads
    i_split = tl.program_id(0) // heads
    splits = tl.num_programs(0) // heads
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_r = tl.arange(0, BR)
    b_map = load_tile(head(p_map, stride_map, 0, i_h), stride_map, o_m, o_n, N, N, WHOLE)  # [BM, BN]
    for i_b in range(i_split, B, splits):
        b_v = load_tile(head(p_v, stride_v, i_b, i_h), stride_v, o_n, o_r, N, R, WHOLE)  # [BN, BR]
        b_out = tl.dot(b_map, b_v, input_precision=PRECISION)  # [BM, BR]
        store_tile(head(p_out, stride_out, i_b, i_h), stride_out, o_m, o_r, b_out, N, R, WHOLE)


@triton.jit(do_not_specialize=["B", "heads"])
def map_gradient_kernel(
    p_dout,
    p_v,
    p_dmap,  # [splits, heads, N, N] float32: one addend a split
    stride_dout,
    stride_v,
    stride_dmap,
    B,
    heads,
    N,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ_b dout · vᵀ over the images of a split, in registers.

    Grid (heads · splits, tiles of rows, tiles of columns).
    """
    i_h = tl.program_id(0) % heads
    i_split = tl.program_id(0) // heads
    splits = tl.num_programs(0) // heads
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    o_n = tl.program_id(2) * BN + tl.arange(0, BN)
    o_r = tl.arange(0, BR)
    b_dmap = tl.zeros([BM, BN], tl.float32)
    for i_b in range(i_split, B, splits):
        b_do = load_tile(head(p_dout, stride_dout, i_b, i_h), stride_dout, o_m, o_r, N, R, WHOLE)  # [BM, BR]
        b_v = load_tile(head(p_v, stride_v, i_b, i_h), stride_v, o_n, o_r, N, R, WHOLE)  # [BN, BR]
        b_dmap = tl.dot(b_do, tl.trans(b_v), acc=b_dmap, input_precision=PRECISION)
    store_tile(head(p_dmap, stride_dmap, i_split, i_h), stride_dmap, o_m, o_n, b_dmap, N, N, WHOLE)
