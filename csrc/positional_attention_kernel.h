// Positional attention on the CPU, one head of one image at a time:
//
//   out = softmax(Q K^T) V,   Q = scale (alpha q + q_pos),   K = alpha k + k_pos
//
// K and V of the head lie in the innermost caches, packed once; the rows of the map are made, used and forgotten
// `kRowBlock` at a time, and the backward pass makes them again. As in simd.h, everything is a template on the
// vector's width and always inlined into a function that is marked with an instruction set.
//
// T is what the factors of matrix products are made of: float, or pairs of bfloat16 numbers, neighbours along the
// depth. Sums, the softmax and its gradient are in single precision either way. Comments give sizes in numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "bfloat16_pairs.h"
#include "elements.h"

namespace convinit::attention {

// A tensor [batch, heads, tokens, rank] or [heads, tokens, rank] whose last dimension is dense. Strides are in bytes.
struct Operand {
  char* data = nullptr;
  Element element = Element::float32;
  int64_t image = 0, head = 0, token = 0;

  explicit operator bool() const { return data != nullptr; }
  char* row(int64_t b, int64_t h, int64_t n) const { return data + b * image + h * head + n * token; }
};

struct Problem {
  int64_t batch, heads, tokens, rank;
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

constexpr int64_t kRowBlock = 48;  // a multiple of the rows of all register tiles
constexpr int64_t kPad = 16;       // floats; the widest vector

inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// Rows that do not lie a power of two apart, which the innermost cache would map to few of its sets.
inline int64_t skewed(int64_t n) { return padded(n) % 128 == 0 ? padded(n) + kPad : padded(n); }

// Memory that a thread keeps from task to task. What is in it at first is whatever the last task left.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    Block& block = mine();
    if (block.floats < floats) {
      block.data.reset();
      block.floats = 0;  // there may be no memory for more
      block.data.reset(static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t{64})));
      block.floats = floats;
    }
    next_ = block.data.get();
  }

  float* take(int64_t floats) {
    float* taken = next_;
    next_ += floats;
    return taken;
  }

 private:
  struct Delete {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  struct Block {
    std::unique_ptr<float, Delete> data;
    int64_t floats = 0;
  };
  static Block& mine() {
    static thread_local Block block;
    return block;
  }

  float* next_;
};

// --- matrix products --------------------------------------------------------------------------------------------

// The right factor of a product, in panels of `kColumns<W>` columns: word (p, j) of a panel is data[p ld + j], and
// the next panel starts `step` further.
struct Panels {
  float* data;
  int64_t step, ld;
};

// The left factor: word (i, p) is data[i row + p col].
struct Left {
  const float* data;
  int64_t row, col;
};

// A register tile has up to kVectors vectors in a row, and as many rows as leave the registers for the factors free.
template <int W>
constexpr int kVectors = W == 16 ? 4 : 2;
template <int W>
constexpr int64_t kColumns = kVectors<W>* W;
template <int W, int NV>
constexpr int kRows = W == 16 && NV < 4 ? 8 : 6;

template <int W, class T>
int64_t panel_floats(int64_t depth, int64_t columns) {
  return (columns + kColumns<W> - 1) / kColumns<W> * kColumns<W> * words<T>(depth);
}

template <int W, class T, int NV>
CONVINIT_INLINE void panel_product(int64_t rows, int64_t depth, Left a, const float* b_, int64_t ldb, float* c,
                                   int64_t ldc, bool accumulate) {
  constexpr int MR = kRows<W, NV>;
  const T *left = reinterpret_cast<const T*>(a.data), *b = reinterpret_cast<const T*>(b_);
  int64_t i = 0;
  for (; i + MR <= rows; i += MR)
    simd::gemm_tile<W, MR, NV>(depth, left + i * a.row, a.row, a.col, b, ldb, c + i * ldc, ldc, accumulate);
  for (; i + 2 <= rows; i += 2)
    simd::gemm_tile<W, 2, NV>(depth, left + i * a.row, a.row, a.col, b, ldb, c + i * ldc, ldc, accumulate);
  for (; i < rows; ++i)
    simd::gemm_tile<W, 1, NV>(depth, left + i * a.row, a.row, a.col, b, ldb, c + i * ldc, ldc, accumulate);
}

// C [rows, columns] = (accumulate ? C : 0) + A B, C in single precision; columns must be a multiple of W.
template <int W, class T>
CONVINIT_INLINE void product(int64_t rows, int64_t columns, int64_t depth, Left a, Panels b, float* c, int64_t ldc,
                             bool accumulate = false) {
  depth = words<T>(depth);
  for (int64_t j = 0; j < columns; j += kColumns<W>, b.data += b.step, c += kColumns<W>) {
    const int64_t vectors = std::min(columns - j, kColumns<W>) / W;
    if (vectors == 1) panel_product<W, T, 1>(rows, depth, a, b.data, b.ld, c, ldc, accumulate);
    if (vectors == 2) panel_product<W, T, 2>(rows, depth, a, b.data, b.ld, c, ldc, accumulate);
    if constexpr (kVectors<W> == 4) {
      if (vectors == 3) panel_product<W, T, 3>(rows, depth, a, b.data, b.ld, c, ldc, accumulate);
      if (vectors == 4) panel_product<W, T, 4>(rows, depth, a, b.data, b.ld, c, ldc, accumulate);
    }
  }
}

// Rows [rows, ld] as a left factor whose depth are their columns. Pairs take the rows' place.
template <class T>
CONVINIT_INLINE Left by_columns(float* x, int64_t rows, int64_t columns, int64_t ld) {
  if constexpr (kPairs<T>)
    for (int64_t i = 0; i < rows; ++i) simd::pair_columns(x + i * ld, columns);
  return {x, ld, 1};
}

// Rows [rows, ld] as a factor whose depth are the rows themselves: what is returned is word (p, j) at p ld + j, of
// pairs in `to` [rows / 2, ld]. A last row without a neighbour gets one of zeros, for which there must be room.
template <class T>
CONVINIT_INLINE float* by_rows(float* x, int64_t rows, int64_t columns, int64_t ld, float* to) {
  if constexpr (kPairs<T>) {
    if (rows % 2 == 1) std::fill(x + rows * ld, x + rows * ld + columns, 0.0f);
    for (int64_t i = 0; i < rows; i += 2) simd::pair_rows(x + i * ld, x + (i + 1) * ld, columns, to + i / 2 * ld);
    return to;
  }
  return x;
}

// --- packing ----------------------------------------------------------------------------------------------------

// factor (alpha content + position) of rows [first, first + rows) of a head, [rows, ld], zeros beyond the rank.
template <int W>
CONVINIT_INLINE void load_rows(const Operand& content, float alpha, const Operand& position, float factor, int64_t b,
                               int64_t h, int64_t first, int64_t rows, int64_t rank, float* to, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = to + i * ld;
    simd::load_row<W>(content.element, content.row(b, h, first + i), rank, factor * alpha, row);
    if (position) simd::load_row<W>(position.element, position.row(0, h, first + i), rank, factor, row, true);
    for (int64_t c = (rank + W - 1) / W * W; c < ld; ++c) row[c] = 0;
  }
}

// alpha content + position of a head, as right factor [tokens, rank] and as its transpose [rank, tokens], either
// or both (a step of 0 leaves one out). `block` has room for [kPad, padded rank].
template <int W, class T>
CONVINIT_INLINE void pack(const Problem& p, const Operand& content, float alpha, const Operand& position, int64_t b,
                          int64_t h, float* block, const Panels& plain, const Panels& transposed) {
  constexpr int kTogether = kPairs<T> ? 2 : 1;
  const int64_t ld = padded(p.rank), depth = words<T>(p.rank);
  for (int64_t n = 0; n < padded(p.tokens); n += W) {
    const int64_t rows = std::clamp<int64_t>(p.tokens - n, 0, W);
    load_rows<W>(content, alpha, position, 1, b, h, n, rows, p.rank, block, ld);
    std::fill(block + rows * ld, block + W * ld, 0.0f);
    if (plain.step > 0) {
      for (int64_t i = 0; i < rows; i += kTogether)
        for (int64_t c = 0; c < ld; c += W) {
          float* to = plain.data + c / kColumns<W> * plain.step + (n + i) / kTogether * plain.ld + c % kColumns<W>;
          const float* from = block + i * ld + c;
          if constexpr (kTogether == 2) simd::pair_rows(from, from + ld, W, to);
          else simd::store<W>(to, simd::load<W>(from));
        }
    }
    if (transposed.step > 0) {
      by_columns<T>(block, W, ld, ld);
      float* to = transposed.data + n / kColumns<W> * transposed.step + n % kColumns<W>;
      for (int64_t c = 0; c < depth; c += W) {
        simd::F<W> square[W];
        for (int i = 0; i < W; ++i) square[i] = simd::load<W>(block + i * ld + c);
        simd::transpose<W>(square);
        for (int64_t i = 0; i < std::min<int64_t>(W, depth - c); ++i)
          simd::store<W>(to + (c + i) * transposed.ld, square[i]);
      }
    }
  }
}

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

  pack<W, T>(p, p.k, p.alpha, p.k_pos, b, h, block, {}, k_t);
  pack<W, T>(p, p.v, 1, {}, b, h, block, v, {});
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

  pack<W, T>(p, p.k, p.alpha, p.k_pos, b, h, block, k, k_t);
  if (logits) pack<W, T>(p, p.v, 1, {}, b, h, block, {}, v_t);
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
