// Positional attention on the CPU, one head of one image at a time:
//
//   out = softmax(Q K^T) V,   Q = scale (alpha q + q_pos),   K = alpha k + k_pos
//
// K and V of the head lie in the innermost caches, packed once; the rows of the map are made, used and forgotten
// `kRowBlock` at a time, and the backward pass makes them again. The softmax and its gradient are in single precision.
#pragma once

#include <cmath>
#include <limits>

#include "panels.h"

namespace convinit::attention {

struct Problem : Sizes {
  float scale, alpha;
  Operand q, k, v, q_pos, k_pos;
};

// Gradients that nobody asks for are empty. The position terms' are sums over images, kept in single precision
// as [heads, tokens, padded rank] with the image's contribution added to what is there.
struct Gradients {
  Operand q, k, v;
  float *q_pos = nullptr, *k_pos = nullptr;

  bool any_q() const { return q || q_pos; }
  bool any_k() const { return k || k_pos; }
};

// --- softmax ----------------------------------------------------------------------------------------------------

struct RowSum {
  float top, sum;
};

// exp(x - top) of one row [ld], top being its largest entry; zeros beyond n.
template <int W>
CONVINIT_INLINE RowSum exponentials(float* x, int64_t n, int64_t ld) {
  using V = simd::F<W>;
  for (int64_t j = n; j < ld; ++j) x[j] = -std::numeric_limits<float>::infinity();
  V most = simd::load<W>(x);
  for (int64_t j = W; j < ld; j += W) most = simd::max<W>(most, simd::load<W>(x + j));
  const float top = simd::max_element<W>(most);
  V total{};
  for (int64_t j = 0; j < ld; j += W) {
    const V e = simd::exp_or_nan<W>(simd::load<W>(x + j) - top);
    simd::store<W>(x + j, e);
    total += e;
  }
  return {top, simd::sum<W>(total)};
}

// g = e (g - <e, g> / sum) in place: the gradient of the logits, where e / sum are a row of the map and g is the
// gradient of that row over sum.
template <int W>
CONVINIT_INLINE void logit_gradient(const float* e, float* g, int64_t ld, float sum) {
  using V = simd::F<W>;
  V inner{};
  for (int64_t j = 0; j < ld; j += W) inner += simd::load<W>(e + j) * simd::load<W>(g + j);
  const float mean = simd::sum<W>(inner) / sum;
  for (int64_t j = 0; j < ld; j += W) simd::store<W>(g + j, simd::load<W>(e + j) * (simd::load<W>(g + j) - mean));
}

// --- one head of one image --------------------------------------------------------------------------------------

// Rows [first, last) of out, and their log-sum-exp in base 2.
template <int W, class T>
CONVINIT_INLINE void forward(const Problem& p, int64_t b, int64_t h, int64_t first, int64_t last, const Operand& out,
                             float* lse) {
  const int64_t ld_n = padded(p.tokens), ld_map = skewed(p.tokens), ld_r = padded(p.rank);
  const int64_t k_t_floats = panel_floats<W, T>(p.rank, ld_n), v_floats = panel_floats<W, T>(p.tokens, ld_r);
  Scratch scratch(k_t_floats + v_floats + kPad * ld_r + kRowBlock * (ld_map + 2 * ld_r));
  const Panels k_t{scratch.take(k_t_floats), kColumns<W> * words<T>(p.rank), kColumns<W>};
  const Panels v{scratch.take(v_floats), kColumns<W> * words<T>(p.tokens), kColumns<W>};
  float* block = scratch.take(kPad * ld_r);
  float* q = scratch.take(kRowBlock * ld_r);
  float* map = scratch.take(kRowBlock * ld_map);
  float* rows_out = scratch.take(kRowBlock * ld_r);

  pack<W, T>(p.tokens, p.rank, p.k, p.alpha, p.k_pos, b, h, block, {}, k_t);
  pack<W, T>(p.tokens, p.rank, p.v, 1, {}, b, h, block, v, {});
  for (int64_t i0 = first; i0 < last; i0 += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, last - i0);
    load_rows<W>(p.q, p.alpha, p.q_pos, p.scale, b, h, i0, rows, p.rank, q, ld_r);
    product<W, T>(rows, ld_n, p.rank, by_columns<T>(q, rows, ld_r, ld_r), k_t, map, ld_map);
    RowSum sums[kRowBlock];
    for (int64_t i = 0; i < rows; ++i) sums[i] = exponentials<W>(map + i * ld_map, p.tokens, ld_n);
    product<W, T>(rows, ld_r, p.tokens, by_columns<T>(map, rows, ld_n, ld_map), v, rows_out, ld_r);
    for (int64_t i = 0; i < rows; ++i) {
      simd::store_row<W>(out.element, rows_out + i * ld_r, p.rank, 1 / sums[i].sum, out.row(b, h, i0 + i));
      lse[(b * p.heads + h) * p.tokens + i0 + i] = sums[i].top * 1.44269504f + std::log2(sums[i].sum);
    }
  }
}

// Adds rows [first, first + rows) of a gradient to a sum over images, and writes them times `factor`.
template <int W>
CONVINIT_INLINE void emit(const Problem& p, float* from, int64_t b, int64_t h, int64_t first, int64_t rows,
                          float factor, const Operand& to, float* total) {
  const int64_t ld = padded(p.rank);
  if (total != nullptr) {
    total += (h * p.tokens + first) * ld;
    for (int64_t c = 0; c < rows * ld; c += W)
      simd::store<W>(total + c, simd::load<W>(total + c) + simd::load<W>(from + c));
  }
  for (int64_t i = 0; to && i < rows; ++i)
    simd::store_row<W>(to.element, from + i * ld, p.rank, factor, to.row(b, h, first + i));
}

template <int W, class T>
CONVINIT_INLINE void backward(const Problem& p, int64_t b, int64_t h, const Operand& dout, const Gradients& to) {
  const int64_t ld_n = padded(p.tokens), ld_map = skewed(p.tokens), ld_r = padded(p.rank);
  const int64_t t_floats = panel_floats<W, T>(p.rank, ld_n), floats = panel_floats<W, T>(p.tokens, ld_r);
  const int64_t pair_floats = kPairs<T> ? kRowBlock / 2 * (ld_map + 2 * ld_r) : 0;
  const bool logits = to.any_q() || to.any_k();
  Scratch scratch(2 * t_floats + floats + 2 * p.tokens * ld_r + kPad * ld_r + kRowBlock * (2 * ld_map + 3 * ld_r) +
                  pair_floats);
  const Panels k_t{scratch.take(t_floats), kColumns<W> * words<T>(p.rank), kColumns<W>};
  const Panels v_t{scratch.take(t_floats), kColumns<W> * words<T>(p.rank), kColumns<W>};
  const Panels k{scratch.take(floats), to.any_q() ? kColumns<W> * words<T>(p.tokens) : 0, kColumns<W>};
  float* dk = scratch.take(p.tokens * ld_r);
  float* dv = scratch.take(p.tokens * ld_r);
  float* block = scratch.take(kPad * ld_r);
  float* map = scratch.take(kRowBlock * ld_map);
  float* dmap = scratch.take(kRowBlock * ld_map);
  float* q = scratch.take(kRowBlock * ld_r);
  float* rows_dout = scratch.take(kRowBlock * ld_r);
  float* dq = scratch.take(kRowBlock * ld_r);
  float* pairs = scratch.take(pair_floats);  // of rows of a map, of q and of dout, one after the other
  float *q_pairs = pairs + kRowBlock / 2 * ld_map, *dout_pairs = q_pairs + kRowBlock / 2 * ld_r;

  pack<W, T>(p.tokens, p.rank, p.k, p.alpha, p.k_pos, b, h, block, k, k_t);
  if (logits) pack<W, T>(p.tokens, p.rank, p.v, 1, {}, b, h, block, {}, v_t);
  for (int64_t i0 = 0; i0 < p.tokens; i0 += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, p.tokens - i0);
    const bool accumulate = i0 > 0;
    load_rows<W>(p.q, p.alpha, p.q_pos, p.scale, b, h, i0, rows, p.rank, q, ld_r);
    const Panels q_rows{by_rows<T>(q, rows, ld_r, ld_r, q_pairs), kColumns<W>, ld_r};
    product<W, T>(rows, ld_n, p.rank, by_columns<T>(q, rows, ld_r, ld_r), k_t, map, ld_map);
    float sums[kRowBlock];
    // The map is left unnormalised: the rows of dout are divided by the sums instead.
    for (int64_t i = 0; i < rows; ++i) {
      sums[i] = exponentials<W>(map + i * ld_map, p.tokens, ld_n).sum;
      load_rows<W>(dout, 1, {}, 1 / sums[i], b, h, i0 + i, 1, p.rank, rows_dout + i * ld_r, ld_r);
    }
    if (to.v) {
      const Panels dout_rows{by_rows<T>(rows_dout, rows, ld_r, ld_r, dout_pairs), kColumns<W>, ld_r};
      const Left map_t{by_rows<T>(map, rows, ld_n, ld_map, pairs), 1, ld_map};
      product<W, T>(p.tokens, ld_r, rows, map_t, dout_rows, dv, ld_r, accumulate);
    }
    if (!logits) continue;
    product<W, T>(rows, ld_n, p.rank, by_columns<T>(rows_dout, rows, ld_r, ld_r), v_t, dmap, ld_map);
    for (int64_t i = 0; i < rows; ++i) logit_gradient<W>(map + i * ld_map, dmap + i * ld_map, ld_n, sums[i]);
    if (to.any_k()) {
      const Left dmap_t{by_rows<T>(dmap, rows, ld_n, ld_map, pairs), 1, ld_map};
      product<W, T>(p.tokens, ld_r, rows, dmap_t, q_rows, dk, ld_r, accumulate);
    }
    if (!to.any_q()) continue;
    product<W, T>(rows, ld_r, p.tokens, by_columns<T>(dmap, rows, ld_n, ld_map), k, dq, ld_r);
    for (int64_t c = 0; c < rows * ld_r; c += W) simd::store<W>(dq + c, p.scale * simd::load<W>(dq + c));
    emit<W>(p, dq, b, h, i0, rows, p.alpha, to.q, to.q_pos);
  }
  if (to.any_k()) emit<W>(p, dk, b, h, 0, p.tokens, p.alpha, to.k, to.k_pos);
  if (to.v) emit<W>(p, dv, b, h, 0, p.tokens, 1, to.v, nullptr);
}

}  // namespace convinit::attention
