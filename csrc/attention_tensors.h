// The tensors of the CPU's attention ops, as rows in memory.
#pragma once

#include "checks.h"
#include "huge_pages.h"
#include "panels.h"

namespace convinit::attention {

inline Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Element::float32;
    case ScalarType::BFloat16: return Element::bfloat16;
    case ScalarType::Half: return Element::float16;
    default: STD_TORCH_CHECK(false, "convinit: attention takes float32, bfloat16 or float16");
  }
}

// Whether the elements of a row, the last dimension, are neighbours.
inline bool has_dense_rows(const Tensor& x) {
  return x.numel() == 0 || x.size(x.dim() - 1) == 1 || x.stride(x.dim() - 1) == 1;
}

// Of a tensor [B, heads, N, r] or [heads, N, r].
inline Operand operand(const Tensor& x, bool written) {
  STD_TORCH_CHECK(has_dense_rows(x), "convinit: results must be dense in their last dimension");
  const Element element = element_of(x);
  const int64_t size = size_of(element), last = x.dim() - 1;
  void* data = written ? x.mutable_data_ptr() : const_cast<void*>(x.const_data_ptr());
  return {.data = static_cast<char*>(data),
          .element = element,
          .image = last == 3 ? x.stride(0) * size : 0,
          .head = x.stride(last - 2) * size,
          .token = x.stride(last - 1) * size};
}

// An input, copied if it must be.
struct Input {
  Tensor dense;
  Operand operand;

  explicit Input(const Tensor& x)
      : dense(has_dense_rows(x) ? x : torch::stable::contiguous(x)), operand(attention::operand(dense, false)) {}
};

inline void check_side_by_side(const Tensor& x, const Sizes& s) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == s.batch && x.size(1) == s.tokens && x.size(2) == s.heads * s.rank,
                  "convinit: out and dout must have shape [B, N, heads r]");
}

// [B, N, heads r] as [B, heads, N, r].
inline Operand heads_of(const Operand& x, const Tensor& tensor, int64_t rank) {
  const int64_t size = size_of(x.element);
  return {.data = x.data,
          .element = x.element,
          .image = tensor.stride(0) * size,
          .head = rank * size,
          .token = tensor.stride(1) * size};
}

// A result is about to be written for the first time, all over its span of memory.
inline void expect_writes(const Operand& x, const Sizes& s) {
  if (!x) return;
  const int64_t span = (s.batch - 1) * x.image + (s.heads - 1) * x.head + (s.tokens - 1) * x.token;
  prefer_huge_pages(x.data, span + s.rank * size_of(x.element));
}

// Rows of a map or of an output, [0, tokens), in parts of `rows` each, the last perhaps shorter and none empty.
struct Parts {
  int64_t tokens, rows, count;

  // About `wanted` parts of whole row blocks, none with more than `most` rows, a positive number.
  Parts(int64_t tokens, int64_t wanted, int64_t most) : tokens(tokens) {
    const int64_t blocks = (tokens + kRowBlock - 1) / kRowBlock;
    wanted = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(blocks, 1));
    rows = std::max<int64_t>(std::min((blocks + wanted - 1) / wanted * kRowBlock, most), 1);
    count = (tokens + rows - 1) / rows;
  }

  int64_t first(int64_t i) const { return i * rows; }
  int64_t last(int64_t i) const { return std::min((i + 1) * rows, tokens); }
};

// Tasks that are worth a thread of their own, for tasks of so many floating-point operations.
inline int64_t grain(int64_t operations) { return 1 + 1'000'000 / (operations + 1); }

}  // namespace convinit::attention
