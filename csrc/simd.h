// Fixed-width float vectors from the compiler's vector extensions, a small matrix product and exp on top of them.
// Everything is a template on the width W and always inlined, so that a caller marked with an instruction set
// (`__attribute__((target("avx512f")))`) gets the whole of it compiled for that set. No lambdas: they would not
// inherit the caller's target.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // about passing wide vectors between functions: none is, all are inlined
#endif

#define CONVINIT_INLINE __attribute__((always_inline)) inline

namespace convinit::simd {

template <int W>
struct Vec {
  typedef float F __attribute__((vector_size(W * 4)));
  typedef float Unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(W * 4)));
  typedef uint32_t U __attribute__((vector_size(W * 4)));
};

template <int W>
using F = typename Vec<W>::F;

template <int W>
CONVINIT_INLINE F<W> load(const float* p) {
  return *reinterpret_cast<const typename Vec<W>::Unaligned*>(p);
}

template <int W>
CONVINIT_INLINE void store(float* p, F<W> v) {
  *reinterpret_cast<typename Vec<W>::Unaligned*>(p) = v;
}

template <int W>
CONVINIT_INLINE F<W> max(F<W> a, F<W> b) {
  return a > b ? a : b;
}

// The lower and upper halves of a vector.
template <int W>
CONVINIT_INLINE void halve(F<W> v, F<W / 2>& low, F<W / 2>& high) {
  __builtin_memcpy(&low, &v, sizeof(low));
  __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
}

template <int W>
CONVINIT_INLINE float sum(F<W> v) {
  if constexpr (W == 4) return (v[0] + v[1]) + (v[2] + v[3]);
  else {
    F<W / 2> low, high;
    halve<W>(v, low, high);
    return sum<W / 2>(low + high);
  }
}

template <int W>
CONVINIT_INLINE float max_element(F<W> v) {
  if constexpr (W == 4) {
    const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
  } else {
    F<W / 2> low, high;
    halve<W>(v, low, high);
    return max_element<W / 2>(max<W / 2>(low, high));
  }
}

// exp(x) within 2 units in the last place for -87 <= x <= 0; a NaN stays one. What is lower must be masked.
template <int W>
CONVINIT_INLINE F<W> exp_unmasked(F<W> x) {
  using Unsigned = typename Vec<W>::U;  // what is lower than -87, NaN too, may leave the range of int
  // x = n ln2 + r with n an integer: adding 1.5 * 2^23 rounds to the nearest integer in the low mantissa bits.
  const float magic = 12582912.0f;
  const F<W> shifted = x * 1.44269504f + magic;
  const F<W> n = shifted - magic;
  const F<W> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F<W> p = F<W>{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Unsigned exponent = ((Unsigned)shifted - 0x4B400000u + 127u) << 23;
  return p * (F<W>)exponent;
}

// exp(x) for x <= 0, and 0 below -35 and for NaN. e^-35 is 6e-16: next to a row's largest entry, which is 1, it is
// lost in single precision, while its square would be a (slow) subnormal number.
template <int W>
CONVINIT_INLINE F<W> exp_nonpositive(F<W> x) {
  using Int = typename Vec<W>::I;
  const Int kept = x > -35.0f;
  return (F<W>)((Int)exp_unmasked<W>(x) & kept);
}

// exp(x) for x <= 0, and 0 where the result would be subnormal; a NaN stays one.
template <int W>
CONVINIT_INLINE F<W> exp_or_nan(F<W> x) {
  using Int = typename Vec<W>::I;
  const Int lost = x < -87.0f;
  return (F<W>)((Int)exp_unmasked<W>(x) & ~lost);
}

template <int W, int D, int... I>
CONVINIT_INLINE void swap_blocks(F<W>& a, F<W>& b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  const F<W> low = __builtin_shufflevector(a, b, (I & D ? W + I - D : I)...);
  const F<W> high = __builtin_shufflevector(a, b, (I & D ? W + I : I + D)...);
#else
  using Int = typename Vec<W>::I;
  const F<W> low = __builtin_shuffle(a, b, Int{(I & D ? W + I - D : I)...});
  const F<W> high = __builtin_shuffle(a, b, Int{(I & D ? W + I : I + D)...});
#endif
  a = low;
  b = high;
}

// Transposes a W x W matrix: blocks of 2D x 2D swap their D x D corners, D doubling.
template <int W, int D = 1>
CONVINIT_INLINE void transpose(F<W> (&rows)[W]) {
  if constexpr (D < W) {
    for (int i = 0; i < W; ++i)
      if (!(i & D)) swap_blocks<W, D>(rows[i], rows[i + D], std::make_integer_sequence<int, W>{});
    transpose<W, 2 * D>(rows);
  }
}

// One register tile of C: MR rows, NV vectors.
template <int W, int MR, int NV>
CONVINIT_INLINE void gemm_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb,
                               float* c, int64_t ldc, bool accumulate) {
  F<W> acc[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) acc[i][j] = accumulate ? load<W>(c + i * ldc + j * W) : F<W>{};
  for (int64_t p = 0; p < depth; ++p) {
    F<W> row[NV];
    for (int j = 0; j < NV; ++j) row[j] = load<W>(b + p * ldb + j * W);
    for (int i = 0; i < MR; ++i) {
      const float s = a[i * a_row + p * a_col];
      for (int j = 0; j < NV; ++j) acc[i][j] += row[j] * s;
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) store<W>(c + i * ldc + j * W, acc[i][j]);
}

template <int W, int NV>
CONVINIT_INLINE void gemm_panel(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_col,
                                const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  int64_t i = 0;
  for (; i + 6 <= rows; i += 6)
    gemm_tile<W, 6, NV>(depth, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, accumulate);
  for (; i + 2 <= rows; i += 2)
    gemm_tile<W, 2, NV>(depth, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, accumulate);
  for (; i < rows; ++i) gemm_tile<W, 1, NV>(depth, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, accumulate);
}

// C [rows, cols] = (accumulate ? C : 0) + A B, with A(i, p) = a[i a_row + p a_col]; cols must be a multiple of W.
template <int W>
CONVINIT_INLINE void gemm(int64_t rows, int64_t cols, int64_t depth, const float* a, int64_t a_row, int64_t a_col,
                          const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate = false) {
  int64_t j = 0;
  for (; j + 2 * W <= cols; j += 2 * W)
    gemm_panel<W, 2>(rows, depth, a, a_row, a_col, b + j, ldb, c + j, ldc, accumulate);
  for (; j < cols; j += W) gemm_panel<W, 1>(rows, depth, a, a_row, a_col, b + j, ldb, c + j, ldc, accumulate);
}

}  // namespace convinit::simd
