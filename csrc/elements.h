// float32, bfloat16 and float16 in memory, float32 in registers: rows of elements that tensors store in either way.
#pragma once

#include <cstring>

#include "simd.h"

namespace convinit {

enum class Element { float32, bfloat16, float16 };

constexpr int64_t size_of(Element element) { return element == Element::float32 ? 4 : 2; }

namespace simd {

// W 16-bit numbers, each in 32 bits.
template <int W>
CONVINIT_INLINE typename Vec<W>::U load_halves(const void* p) {
  typedef uint16_t Halves __attribute__((vector_size(W * 2)));
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  return __builtin_convertvector(halves, typename Vec<W>::U);
}

template <int W>
CONVINIT_INLINE void store_halves(void* p, typename Vec<W>::U bits) {
  typedef uint16_t Halves __attribute__((vector_size(W * 2)));
  const Halves halves = __builtin_convertvector(bits, Halves);
  std::memcpy(p, &halves, sizeof halves);
}

template <int W>
CONVINIT_INLINE F<W> from_float16(typename Vec<W>::U h) {
  using U = typename Vec<W>::U;
  const U bits = (h & 0x7fff) << 13;
  const U finite = (U)((F<W>)bits * 0x1p112f);  // moves the exponent's zero, of subnormal numbers too
  const U value = (h & 0x7c00) == 0x7c00 ? bits | 0x7f800000 : finite;
  return (F<W>)(value | (h & 0x8000) << 16);
}

// Rounds to nearest, ties to even.
template <int W>
CONVINIT_INLINE typename Vec<W>::U to_float16(F<W> x) {
  using U = typename Vec<W>::U;
  const U sign = (U)x & 0x80000000u, bits = (U)x ^ sign;
  const U normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  const U subnormal = (U)((F<W>)bits + 0.5f) - 0x3f000000u;  // the sum's last bit is float16's smallest number
  U value = bits < U{} + (113u << 23) ? subnormal : normal;
  value = bits >= U{} + (143u << 23) ? U{} + 0x7c00 : value;
  value = bits > U{} + 0x7f800000u ? U{} + 0x7e00 : value;
  return value | sign >> 16;
}

template <int W>
CONVINIT_INLINE F<W> from_bfloat16(typename Vec<W>::U h) {
  return (F<W>)(h << 16);
}

// Rounds to nearest, ties to even.
template <int W>
CONVINIT_INLINE typename Vec<W>::U to_bfloat16(F<W> x) {
  using U = typename Vec<W>::U;
  const U bits = (U)x, magnitude = bits & 0x7fffffffu;
  const U rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return magnitude > U{} + 0x7f800000u ? U{} + 0x7fc0 : rounded;
}

template <int W>
CONVINIT_INLINE F<W> load_elements(Element element, const void* p) {
  if (element == Element::float32) return load<W>(static_cast<const float*>(p));
  const auto bits = load_halves<W>(p);
  return element == Element::bfloat16 ? from_bfloat16<W>(bits) : from_float16<W>(bits);
}

template <int W>
CONVINIT_INLINE void store_elements(Element element, void* p, F<W> x) {
  if (element == Element::float32) return store<W>(static_cast<float*>(p), x);
  store_halves<W>(p, element == Element::bfloat16 ? to_bfloat16<W>(x) : to_float16<W>(x));
}

// to[:n] = factor * from; zeros, or added zeros, up to the next multiple of W.
template <int W>
CONVINIT_INLINE void load_row(Element element, const char* from, int64_t n, float factor, float* to, bool add = false) {
  const int64_t size = size_of(element);
  for (int64_t c = 0; c < n; c += W) {
    char tail[W * 4] = {};
    const char* p = from + c * size;
    if (n - c < W) p = static_cast<const char*>(std::memcpy(tail, p, (n - c) * size));
    const F<W> x = factor * load_elements<W>(element, p);
    store<W>(to + c, add ? load<W>(to + c) + x : x);
  }
}

// to = factor * from[:n]; from is read up to the next multiple of W.
template <int W>
CONVINIT_INLINE void store_row(Element element, const float* from, int64_t n, float factor, char* to) {
  const int64_t size = size_of(element);
  for (int64_t c = 0; c < n; c += W) {
    char tail[W * 4];
    const bool whole = n - c >= W;
    store_elements<W>(element, whole ? to + c * size : tail, factor * load<W>(from + c));
    if (!whole) std::memcpy(to + c * size, tail, (n - c) * size);
  }
}

}  // namespace simd
}  // namespace convinit
