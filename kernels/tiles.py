"""What all kernels share: tiles of one head's [N, R] matrix, and the dropout mask.

Names: ``p_`` pointer, ``i_`` index, ``o_`` offsets along one axis, ``m_`` mask, ``b_`` block on chip.
Strides come as tuples (batch, head, token, channel), as ``Tensor.stride()`` gives them for [B, heads, N, R].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head(p_x, stride, i_b, i_h):
    """Pointer to head i_h of image i_b. 64 bits: B·heads·N·R passes 2³¹ well before memory is full."""
    return p_x + tl.cast(i_b, tl.int64) * stride[0] + tl.cast(i_h, tl.int64) * stride[1]


@triton.jit
def tile_pointers(p_x, stride, o_row, o_col):
    return p_x + o_row.to(tl.int64)[:, None] * stride[2] + o_col.to(tl.int64)[None, :] * stride[3]


@triton.jit
def load_tile(p_x, stride, o_row, o_col, rows, cols):
    """Elements o_row × o_col of a [rows, cols] matrix; zeros outside of it."""
    m_x = (o_row < rows)[:, None] & (o_col < cols)[None, :]
    return tl.load(tile_pointers(p_x, stride, o_row, o_col), mask=m_x, other=0.0)


@triton.jit
def store_tile(p_x, stride, o_row, o_col, b_x, rows, cols):
    """Write the part of a block that lies inside a [rows, cols] matrix, in the matrix's dtype."""
    m_x = (o_row < rows)[:, None] & (o_col < cols)[None, :]
    tl.store(tile_pointers(p_x, stride, o_row, o_col), b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def load_mixed(p_x, stride, p_pos, stride_pos, i_b, i_h, o_n, o_r, alpha, N, R: tl.constexpr):
    """Queries or keys as the logits see them: α x + pos, rounded once; x itself where there is no pos."""
    b_x = load_tile(head(p_x, stride, i_b, i_h), stride, o_n, o_r, N, R)
    if p_pos is not None:
        b_pos = load_tile(head(p_pos, stride_pos, 0, i_h), stride_pos, o_n, o_r, N, R)
        b_x = (alpha * b_x.to(tl.float32) + b_pos.to(tl.float32)).to(b_x.dtype)
    return b_x


@triton.jit
def dropout_factor(p_seed, i_bh, o_query, o_key, N, dropout_p):
    """1/(1−p) where an attention weight stays and 0 where it is dropped.

    The random bits are a function of (seed, image, head, query, key) alone, so that the backward kernels draw
    the forward's mask again whatever the shape and orientation of their tiles.
    """
    key = (i_bh.to(tl.int64) << 32) | tl.load(p_seed)  # Philox's 64-bit key: one stream a head of an image
    return tl.where(tl.rand(key, o_query * N + o_key) >= dropout_p, 1 / (1 - dropout_p), 0.0)
