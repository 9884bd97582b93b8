// Products of bfloat16 numbers as AVX512-BF16 has them: two neighbours along the depth at once, added up in single
// precision. A word holds such a pair, the first in its lower half; `gemm_tile` is that of simd.h over words. Attention
// forward and backward is 1.3 to 1.5 times as fast with them (two builds in turns, two cores of an EPYC with
// AVX512-BF16, [32, 8, 256, 64] to [4, 6, 1024, 64]).
#pragma once

#include <type_traits>

#include "simd.h"

namespace convinit {

struct __attribute__((may_alias)) Pair {
  uint32_t halves;
};

template <class T>
constexpr bool kPairs = std::is_same_v<T, Pair>;

// Words that a depth of n numbers takes.
template <class T>
constexpr int64_t words(int64_t n) {
  return kPairs<T> ? (n + 1) / 2 : n;
}

// The instructions are written by name: their intrinsics can only be inlined into functions that are marked with
// their instruction set, and what is here becomes part of such a one only when it is inlined itself. Clang holds
// names to the same rule; what it builds multiplies bfloat16 numbers in single precision. The assembler must know
// them: binutils 2.33 or newer.
#if defined(__x86_64__) && !defined(__clang__)
#define CONVINIT_BFLOAT16_PAIRS 1

namespace simd {

CONVINIT_INLINE F<16> broadcast(const Pair* p) {
  F<16> v;
  asm("vpbroadcastd %1, %0" : "=v"(v) : "m"(*p));
  return v;
}

// c + the products of both halves.
CONVINIT_INLINE void add_products(F<16>& c, F<16> a, F<16> b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
}

// 32 halves: those of `low`, then those of `high`. Rounds to nearest, ties to even.
CONVINIT_INLINE F<16> to_halves(F<16> low, F<16> high) {
  F<16> v;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(v) : "v"(low), "v"(high));
  return v;
}

// Words of a row's neighbours, in place: row[:columns] -> columns / 2 words; columns must be a multiple of 16. Up to
// 8 words behind them are zeroed.
CONVINIT_INLINE void pair_columns(float* row, int64_t columns) {
  for (int64_t c = 0; c < columns; c += 32) {
    const F<16> high = c + 16 < columns ? load<16>(row + c + 16) : F<16>{};
    store<16>(row + c / 2, to_halves(load<16>(row + c), high));
  }
}

// Words of two rows' numbers, `columns` a multiple of 16.
CONVINIT_INLINE void pair_rows(const float* even, const float* odd, int64_t columns, float* to) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  for (int64_t c = 0; c < columns; c += 16) {
    const Halves v = (Halves)to_halves(load<16>(even + c), load<16>(odd + c));
    const Halves pairs = __builtin_shuffle(v, Halves{0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
    store<16>(to + c, (F<16>)pairs);
  }
}

template <int W, int MR, int NV>
CONVINIT_INLINE void gemm_tile(int64_t depth, const Pair* a, int64_t a_row, int64_t a_col, const Pair* b, int64_t ldb,
                               float* c, int64_t ldc, bool accumulate) {
  static_assert(W == 16);
  F<16> acc[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) acc[i][j] = accumulate ? load<16>(c + i * ldc + j * 16) : F<16>{};
  for (int64_t p = 0; p < depth; ++p) {
    F<16> row[NV];
    for (int j = 0; j < NV; ++j) row[j] = load<16>(reinterpret_cast<const float*>(b + p * ldb + j * 16));
    for (int i = 0; i < MR; ++i) {
      const F<16> s = broadcast(a + i * a_row + p * a_col);
      for (int j = 0; j < NV; ++j) add_products(acc[i][j], s, row[j]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) store<16>(c + i * ldc + j * 16, acc[i][j]);
}

}  // namespace simd

#else

namespace simd {  // for the templates that name them

void pair_columns(float*, int64_t);
void pair_rows(const float*, const float*, int64_t, float*);

}  // namespace simd

#endif

}  // namespace convinit
