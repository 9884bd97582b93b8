// Where the positions of one axis of the token grid point under an offset: one text for the CPU op and the CUDA kernel.
//
// The offset, of any 64-bit value, is reduced once to a shift of at most the period of the axis. After that a position
// costs an addition and a few comparisons, and nothing overflows: an axis has fewer than 2^31 positions.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace convinit {

// Where a row points whose target leaves the grid; the meanings are those of torch.nn.functional.pad.
// The order is that of PADDING_MODES in convinit/_checks.py.
enum class PaddingMode : int64_t { zeros, replicate, circular, reflect };

constexpr int kOutside = -1;

// x mod n in [0, n). A 64-bit division costs a GPU some hundred instructions, and most offsets are small.
CONVINIT_HD inline int64_t modulo(int64_t x, int64_t n) {
  if (x < -n || x >= n) x %= n;
  return x < 0 ? x + n : x;
}

// An offset along an axis, cut to what has an effect with zeros around: from ±size on, nothing of the image is seen.
CONVINIT_HD inline int axis_shift(int64_t offset, int size) {
  return static_cast<int>(offset < -size ? -size : offset > size ? size : offset);
}

class AxisTarget {
 public:
  CONVINIT_HD AxisTarget(int64_t offset, int size, PaddingMode mode) : size_(size), mode_(mode) {
    const int64_t n = size;
    switch (mode) {
      case PaddingMode::zeros:
      case PaddingMode::replicate: shift_ = axis_shift(offset, size); break;
      case PaddingMode::circular: shift_ = modulo(offset, n); break;
      case PaddingMode::reflect: shift_ = modulo(offset, period()); break;
    }
  }

  // The index of the axis that position i points to, or kOutside.
  CONVINIT_HD int operator()(int i) const {
    const int64_t target = i + shift_;
    switch (mode_) {
      case PaddingMode::zeros: return target < 0 || target >= size_ ? kOutside : static_cast<int>(target);
      case PaddingMode::replicate: return static_cast<int>(target < 0 ? 0 : target >= size_ ? size_ - 1 : target);
      case PaddingMode::circular: return static_cast<int>(target < size_ ? target : target - size_);
      case PaddingMode::reflect: {
        const int64_t phase = target < period() ? target : target - period();
        return static_cast<int>(phase < period() - phase ? phase : period() - phase);
      }
    }
    return kOutside;
  }

 private:
  // Back and forth without repeating the edges: 0 1 2 3 2 1 | 0 1 ...; an axis of one has nowhere to go.
  CONVINIT_HD int64_t period() const { return size_ > 1 ? 2 * (static_cast<int64_t>(size_) - 1) : 1; }

  int size_;
  PaddingMode mode_;
  int64_t shift_ = 0;
};

}  // namespace convinit
