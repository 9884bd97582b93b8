// What csrc uses of LibTorch's stable ABI, on plain memory: so little that no torch need be loaded, and every tensor has
// an allocation of exactly its span, beyond which the address sanitizer sees all reads and writes.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

namespace torch::stable {

using headeronly::ScalarType;
using Sizes = std::vector<int64_t>;

inline int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float: return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    default: return 1;
  }
}

inline Sizes contiguous_strides(const Sizes& sizes) {
  Sizes strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  return strides;
}

class Tensor {
 public:
  // Memory of all ones: NaN for whoever reads what nobody wrote.
  Tensor(Sizes sizes, Sizes strides, ScalarType dtype)
      : sizes_(std::move(sizes)), strides_(std::move(strides)), dtype_(dtype) {
    memory_.reset(new char[bytes()]);
    std::memset(memory_.get(), 0xff, bytes());
    data_ = memory_.get();
  }

  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t d) const { return sizes_.at(d < 0 ? d + dim() : d); }
  int64_t stride(int64_t d) const { return strides_.at(d < 0 ? d + dim() : d); }
  const Sizes& sizes() const { return sizes_; }
  const Sizes& strides() const { return strides_; }
  ScalarType scalar_type() const { return dtype_; }
  int64_t numel() const {
    int64_t product = 1;
    for (const int64_t size : sizes_) product *= size;
    return product;
  }
  int64_t bytes() const {  // from the first element to the last
    int64_t last = 0;
    for (int64_t d = 0; d < dim(); ++d) last += (sizes_[d] - 1) * strides_[d];
    return numel() == 0 ? 0 : (last + 1) * bytes_of(dtype_);
  }
  bool is_contiguous() const {
    const Sizes expected = contiguous_strides(sizes_);
    for (int64_t d = 0; d < dim(); ++d)
      if (sizes_[d] != 1 && strides_[d] != expected[d] && numel() > 0) return false;
    return true;
  }

  void* data_ptr() const { return data_; }
  const void* const_data_ptr() const { return data_; }
  void* mutable_data_ptr() const { return data_; }
  template <class T>
  const T* const_data_ptr() const {
    return reinterpret_cast<const T*>(data_);
  }
  template <class T>
  T* mutable_data_ptr() const {
    return reinterpret_cast<T*>(data_);
  }

  // visit(address) of all elements, the last dimension fastest.
  template <class Visit>
  void for_each(Visit visit) const {
    if (numel() == 0) return;
    Sizes index(sizes_.size(), 0);
    for (int64_t n = numel(); n > 0; --n) {
      int64_t at = 0;
      for (int64_t d = 0; d < dim(); ++d) at += index[d] * strides_[d];
      visit(data_ + at * bytes_of(dtype_));
      for (int64_t d = dim(); d-- > 0 && ++index[d] == sizes_[d];) index[d] = 0;
    }
  }

  Tensor swapped(int64_t a, int64_t b) const {
    Tensor view = *this;
    std::swap(view.sizes_[a], view.sizes_[b]);
    std::swap(view.strides_[a], view.strides_[b]);
    return view;
  }

 private:
  std::shared_ptr<char[]> memory_;
  char* data_;
  Sizes sizes_, strides_;
  ScalarType dtype_;
};

}  // namespace torch::stable
