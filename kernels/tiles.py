"""What all kernels share: tiles of one head's [N, R] matrix.

Names: ``p_`` pointer, ``i_`` index, ``o_`` offsets along one axis, ``m_`` mask, ``b_`` block on chip.
Strides come as tuples (batch, head, token, channel), as ``Tensor.stride()`` gives them for [B, heads, N, R].
WHOLE says that no tile reaches over its matrix, so that nothing is masked.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nothing_kernel():
    pass


@triton.jit
def head(p_x, stride, i_b, i_h):
    """Pointer to head i_h of image i_b. 64 bits: B·heads·N·R passes 2³¹ well before memory is full."""
    return p_x + tl.cast(i_b, tl.int64) * stride[0] + tl.cast(i_h, tl.int64) * stride[1]


@triton.jit
def tile_pointers(p_x, stride, o_row, o_col):
    """Within a head 32 bits will do, at half the instructions; launch.py copies what reaches further."""
    return p_x + (o_row[:, None] * stride[2] + o_col[None, :] * stride[3])


@triton.jit
def load_tile(p_x, stride, o_row, o_col, rows, cols, WHOLE: tl.constexpr):
    """Elements o_row × o_col of a [rows, cols] matrix; zeros outside of it."""
    p_tile = tile_pointers(p_x, stride, o_row, o_col)
    if WHOLE:
        return tl.load(p_tile)
    return tl.load(p_tile, mask=(o_row < rows)[:, None] & (o_col < cols)[None, :], other=0.0)


@triton.jit
def store_tile(p_x, stride, o_row, o_col, b_x, rows, cols, WHOLE: tl.constexpr):
    """Write the part of a block that lies inside a [rows, cols] matrix, in the matrix's dtype."""
    p_tile = tile_pointers(p_x, stride, o_row, o_col)
    if WHOLE:
        tl.store(p_tile, b_x.to(p_x.dtype.element_ty))
    else:
        m_x = (o_row < rows)[:, None] & (o_col < cols)[None, :]
        tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def load_row(p_x, o_row, rows, padding, WHOLE: tl.constexpr):
    """Elements o_row of a vector of `rows` float32 numbers; `padding` outside of it."""
    if WHOLE:
        return tl.load(p_x + o_row)
    return tl.load(p_x + o_row, mask=o_row < rows, other=padding)


@triton.jit
def store_row(p_x, o_row, b_x, rows, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(p_x + o_row, b_x)
    else:
        tl.store(p_x + o_row, b_x, mask=o_row < rows)


@triton.jit
def load_mixed(
    p_x, stride, p_pos, stride_pos, i_b, i_h, o_n, o_r, alpha, N, R: tl.constexpr, WHOLE: tl.constexpr
):
    """Queries or keys as the logits see them: α x + pos, rounded once; x itself where there is no pos."""
    b_x = load_tile(head(p_x, stride, i_b, i_h), stride, o_n, o_r, N, R, WHOLE)
    if p_pos is not None:
        b_pos = load_tile(head(p_pos, stride_pos, 0, i_h), stride_pos, o_n, o_r, N, R, WHOLE)
        b_x = (alpha * b_x.to(tl.float32) + b_pos.to(tl.float32)).to(b_x.dtype)
    return b_x
