// What the CPU's attention kernels are made of: rows of heads, packed into panels, and their products.
//
// As in simd.h, everything is a template on the vector's width and always inlined into a function that is marked with
// an instruction set. T is what the factors of matrix products are made of: float, or pairs of bfloat16 numbers,
// neighbours along the depth. Sums are in single precision either way. Comments give sizes in numbers.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "bfloat16_pairs.h"
#include "elements.h"

namespace convinit::attention {

struct Sizes {
  int64_t batch, heads, tokens, rank;
};

// A tensor [batch, heads, tokens, rank] or [heads, tokens, rank] whose last dimension is dense. Strides are in bytes.
struct Operand {
  char* data = nullptr;
  Element element = Element::float32;
  int64_t image = 0, head = 0, token = 0;

  explicit operator bool() const { return data != nullptr; }
  char* row(int64_t b, int64_t h, int64_t n) const { return data + b * image + h * head + n * token; }
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
#if defined(__SANITIZE_ADDRESS__)  // pieces of their own, beyond which a step is seen, without what the last task left
    pieces_.emplace_back(new float[floats]);
    std::fill_n(pieces_.back().get(), floats, std::numeric_limits<float>::quiet_NaN());
    return pieces_.back().get();
#endif
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
#if defined(__SANITIZE_ADDRESS__)
  std::vector<std::unique_ptr<float[]>> pieces_;
#endif
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
constexpr int64_t kColumns = kVectors<W> * W;
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
CONVINIT_INLINE void pack(int64_t tokens, int64_t rank, const Operand& content, float alpha, const Operand& position,
                          int64_t b, int64_t h, float* block, const Panels& plain, const Panels& transposed) {
  constexpr int kTogether = kPairs<T> ? 2 : 1;
  const int64_t ld = padded(rank), depth = words<T>(rank);
  for (int64_t n = 0; n < padded(tokens); n += W) {
    const int64_t rows = std::clamp<int64_t>(tokens - n, 0, W);
    load_rows<W>(content, alpha, position, 1, b, h, n, rows, rank, block, ld);
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

}  // namespace convinit::attention
