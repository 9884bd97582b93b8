// One attention map for all images on the CPU, of one head:
//
//   out[b] = map v[b]          and          dmap = sum over b of dout[b] v[b]^T
//
// A few images' values are packed at once, so that each block of `kRowBlock` rows of the map, packed as well, serves
// them all. The gradient has its rows added up image by image.
#pragma once

#include "panels.h"

namespace convinit::attention {

// A map [heads, N, N], or its transpose, whose rows are then the depth of the product.
struct Map {
  Operand rows;
  bool transposed;
};

// Images whose values [N, rank] take about 256 KB together, a share of a core's second cache.
inline int64_t images_together(const Sizes& s) {
  return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, s.tokens * padded(s.rank)));
}

// Rows of a map's gradient whose sums take about 512 KB: whole row blocks, one at least.
inline int64_t rows_together(const Sizes& s) {
  return std::max<int64_t>(1, 131072 / skewed(s.tokens) / kRowBlock) * kRowBlock;
}

// Rows [first, first + rows) of a map as a left factor. `block` [N + 1, ld] or [rows, ld] and `pairs` [N / 2, ld] have
// room for either.
template <int W, class T>
CONVINIT_INLINE Left map_rows(const Map& map, int64_t h, int64_t first, int64_t rows, int64_t tokens, float* block,
                              float* pairs) {
  if (map.transposed) {
    Operand part = map.rows;
    part.data += first * size_of(part.element);
    load_rows<W>(part, 1, {}, 1, 0, h, 0, tokens, rows, block, kRowBlock);
    return {by_rows<T>(block, tokens, kRowBlock, kRowBlock, pairs), 1, kRowBlock};
  }
  const int64_t ld = skewed(tokens);
  load_rows<W>(map.rows, 1, {}, 1, 0, h, first, rows, tokens, block, ld);
  return by_columns<T>(block, rows, padded(tokens), ld);
}

// out of head h and images [first, last), which are `images_together` at most.
template <int W, class T>
CONVINIT_INLINE void apply_map(const Sizes& s, const Map& map, const Operand& v, int64_t h, int64_t first, int64_t last,
                               const Operand& out) {
  const int64_t ld_r = padded(s.rank), v_floats = panel_floats<W, T>(s.tokens, ld_r);
  const int64_t v_step = kColumns<W> * words<T>(s.tokens);
  const int64_t map_floats = std::max(kRowBlock * skewed(s.tokens), (s.tokens + 1) * kRowBlock);
  const int64_t pair_floats = kPairs<T> ? words<T>(s.tokens) * kRowBlock : 0;
  Scratch scratch((last - first) * v_floats + kPad * ld_r + map_floats + pair_floats + kRowBlock * ld_r);
  float* values = scratch.take((last - first) * v_floats);
  float* block = scratch.take(kPad * ld_r);
  float* rows_map = scratch.take(map_floats);
  float* pairs = scratch.take(pair_floats);
  float* rows_out = scratch.take(kRowBlock * ld_r);

  for (int64_t b = first; b < last; ++b)
    pack<W, T>(s.tokens, s.rank, v, 1, {}, b, h, block, {values + (b - first) * v_floats, v_step, kColumns<W>}, {});
  for (int64_t i0 = 0; i0 < s.tokens; i0 += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, s.tokens - i0);
    const Left left = map_rows<W, T>(map, h, i0, rows, s.tokens, rows_map, pairs);
    for (int64_t b = first; b < last; ++b) {
      product<W, T>(rows, ld_r, s.tokens, left, {values + (b - first) * v_floats, v_step, kColumns<W>}, rows_out, ld_r);
      for (int64_t i = 0; i < rows; ++i)
        simd::store_row<W>(out.element, rows_out + i * ld_r, s.rank, 1, out.row(b, h, i0 + i));
    }
  }
}

// Rows [first, last) of the gradient of head h, from all images.
template <int W, class T>
CONVINIT_INLINE void map_gradient(const Sizes& s, const Operand& dout, const Operand& v, int64_t h, int64_t first,
                                  int64_t last, const Operand& dmap) {
  const int64_t ld_n = padded(s.tokens), ld = skewed(s.tokens), ld_r = padded(s.rank);
  const int64_t v_floats = panel_floats<W, T>(s.rank, ld_n);
  Scratch scratch(v_floats + kPad * ld_r + kRowBlock * ld_r + (last - first) * ld);
  const Panels v_t{scratch.take(v_floats), kColumns<W> * words<T>(s.rank), kColumns<W>};
  float* block = scratch.take(kPad * ld_r);
  float* rows_dout = scratch.take(kRowBlock * ld_r);
  float* sum = scratch.take((last - first) * ld);

  if (s.batch == 0) std::fill(sum, sum + (last - first) * ld, 0.0f);
  for (int64_t b = 0; b < s.batch; ++b) {
    pack<W, T>(s.tokens, s.rank, v, 1, {}, b, h, block, {}, v_t);
    for (int64_t i0 = first; i0 < last; i0 += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, last - i0);
      load_rows<W>(dout, 1, {}, 1, b, h, i0, rows, s.rank, rows_dout, ld_r);
      product<W, T>(rows, ld_n, s.rank, by_columns<T>(rows_dout, rows, ld_r, ld_r), v_t, sum + (i0 - first) * ld, ld,
                    b > 0);
    }
  }
  for (int64_t i = first; i < last; ++i)
    simd::store_row<W>(dmap.element, sum + (i - first) * ld, s.tokens, 1, dmap.row(0, h, i));
}

}  // namespace convinit::attention
