// The functions of the stable ABI that csrc calls; see tensor.h.
#pragma once

#include <thread>

#include "tensor.h"

namespace torch::stable {

// Among how many a range is divided: threads under the thread sanitizer, else parts that run one after the other.
inline int64_t threads = 1;
inline int64_t get_num_threads() { return threads; }

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  const int64_t parts = std::clamp<int64_t>((end - begin) / std::max<int64_t>(grain, 1), 1, threads);
  const int64_t part = (end - begin + parts - 1) / parts;
#ifdef __SANITIZE_THREAD__
  std::vector<std::thread> running;
  for (int64_t first = begin; first < end; first += part)
    running.emplace_back([&f, first, last = std::min(first + part, end)] { f(first, last); });
  for (std::thread& thread : running) thread.join();
#else
  for (int64_t first = begin; first < end; first += part) f(first, std::min(first + part, end));
#endif
}

inline Tensor new_empty(const Tensor& like, Sizes sizes, std::optional<ScalarType> dtype = std::nullopt) {
  const Sizes strides = contiguous_strides(sizes);
  return Tensor(std::move(sizes), strides, dtype.value_or(like.scalar_type()));
}

inline Tensor empty_like(const Tensor& x) { return Tensor(x.sizes(), x.strides(), x.scalar_type()); }

inline Tensor copy_(const Tensor& to, const Tensor& from) {
  std::vector<const char*> sources;
  from.for_each([&](char* p) { sources.push_back(p); });
  auto source = sources.begin();
  to.for_each([&](char* p) { std::memcpy(p, *source++, bytes_of(to.scalar_type())); });
  return to;
}

inline Tensor contiguous(const Tensor& x) { return x.is_contiguous() ? x : copy_(new_empty(x, x.sizes()), x); }

inline Tensor transpose(const Tensor& x, int64_t a, int64_t b) { return x.swapped(a, b); }

template <class Use>
void with_type(ScalarType dtype, Use use) {
  switch (dtype) {
    case ScalarType::Double: use(double{}); break;
    case ScalarType::Float: use(float{}); break;
    case ScalarType::Half: use(headeronly::Half{}); break;
    case ScalarType::BFloat16: use(headeronly::BFloat16{}); break;
    default: STD_TORCH_CHECK(false, "no floating-point dtype");
  }
}

inline Tensor to(const Tensor& x, ScalarType dtype) {
  if (dtype == x.scalar_type()) return x;
  const Tensor out = new_empty(x, x.sizes(), dtype);
  std::vector<double> values;
  with_type(x.scalar_type(), [&](auto zero) {
    x.for_each([&](char* p) {
      std::memcpy(&zero, p, sizeof zero);
      values.push_back(static_cast<double>(static_cast<float>(zero)));
    });
  });
  auto value = values.begin();
  with_type(dtype, [&](auto zero) {
    out.for_each([&](char* p) {
      zero = static_cast<decltype(zero)>(static_cast<float>(*value++));
      std::memcpy(p, &zero, sizeof zero);
    });
  });
  return out;
}

}  // namespace torch::stable
