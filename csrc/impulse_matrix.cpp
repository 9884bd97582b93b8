#include "impulse_matrix.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace convinit {
namespace {

constexpr int64_t kOutside = -1;

// x mod n in [0, n).
int64_t modulo(int64_t x, int64_t n) {
  const int64_t remainder = x % n;
  return remainder < 0 ? remainder + n : remainder;
}

// Where each position of an axis of `size` points under `offset`: an index of the axis, or kOutside.
// The offset is reduced before it is added, so that no offset overflows.
void fill_axis_targets(int64_t offset, int64_t size, PaddingMode mode, int64_t* targets) {
  switch (mode) {
    case PaddingMode::circular: {
      const int64_t shift = modulo(offset, size);
      for (int64_t i = 0; i < size; ++i) targets[i] = (i + shift) % size;
      return;
    }
    case PaddingMode::reflect: {
      // Back and forth without repeating the edges: 0 1 2 3 2 1 | 0 1 ...; an axis of one has nowhere to go.
      const int64_t period = std::max<int64_t>(2 * (size - 1), 1);
      const int64_t shift = modulo(offset, period);
      for (int64_t i = 0; i < size; ++i) {
        const int64_t phase = (i + shift) % period;
        targets[i] = std::min(phase, period - phase);
      }
      return;
    }
    case PaddingMode::zeros:
    case PaddingMode::replicate: {
      const int64_t shift = std::clamp(offset, -size, size);
      for (int64_t i = 0; i < size; ++i) {
        const int64_t target = std::clamp<int64_t>(i + shift, 0, size - 1);
        targets[i] = mode == PaddingMode::replicate || target == i + shift ? target : kOutside;
      }
      return;
    }
  }
}

// The targets of all offsets along both axes: [B, height] and [B, width].
struct AxisTargets {
  std::vector<int64_t> rows, columns;
  int64_t height, width;

  AxisTargets(const int64_t* offsets, int64_t batch, int64_t height, int64_t width, PaddingMode mode)
      : rows(batch * height), columns(batch * width), height(height), width(width) {
    for (int64_t b = 0; b < batch; ++b) {
      fill_axis_targets(offsets[2 * b], height, mode, rows.data() + b * height);
      fill_axis_targets(offsets[2 * b + 1], width, mode, columns.data() + b * width);
    }
  }

  // The column of the 1 in a row of the [B * N, N] result, or kOutside.
  int64_t operator()(int64_t row) const {
    const int64_t y = rows[row / width];  // row / width = b * height + i
    const int64_t x = columns[row / (height * width) * width + row % width];
    return y == kOutside || x == kOutside ? kOutside : y * width + x;
  }
};

// Asks the kernel for huge pages under memory that is about to be written for the first time. Most of the time
// of a large result goes into page faults, and this saves most of them; where it is refused nothing is lost.
void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 * 1024 * 1024;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Writes [rows, columns] once: blocks that fit the innermost caches are zeroed and given their ones at once.
template <class T>
void fill_rows(T* out, int64_t rows, int64_t columns, const AxisTargets& targets) {
  constexpr int64_t kBlockBytes = 32 * 1024;
  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(T));
  const int64_t block = std::max<int64_t>(kBlockBytes / row_bytes, 1);
  const int64_t grain = std::max<int64_t>(8 * kBlockBytes / row_bytes, 1);
  prefer_huge_pages(out, rows * row_bytes);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += block) {
      const int64_t last = std::min(first + block, end);
      std::memset(static_cast<void*>(out + first * columns), 0, (last - first) * row_bytes);
      for (int64_t row = first; row < last; ++row) {
        if (const int64_t column = targets(row); column != kOutside) {
          out[row * columns + column] = static_cast<T>(1);
        }
      }
    }
  });
}

}  // namespace

Tensor impulse_matrix_cpu(const Tensor& offsets, int64_t height, int64_t width, int64_t padding_mode,
                          ScalarType dtype) {
  STD_TORCH_CHECK(offsets.dim() == 2 && offsets.size(1) == 2, "convinit: offsets must have shape [B, 2]");
  CONVINIT_CHECK_DTYPE(offsets, Long);
  STD_TORCH_CHECK(height > 0 && width > 0 && height <= INT32_MAX / width,
                  "convinit: height and width must be positive, and height * width below 2^31");
  STD_TORCH_CHECK(padding_mode >= 0 && padding_mode <= static_cast<int64_t>(PaddingMode::reflect),
                  "convinit: padding_mode must be 0, 1, 2 or 3");

  const int64_t batch = offsets.size(0), tokens = height * width;
  Tensor out = torch::stable::new_empty(offsets, {batch, tokens, tokens}, dtype);
  if (batch == 0) return out;

  const Tensor packed = torch::stable::contiguous(offsets);
  const AxisTargets targets(packed.const_data_ptr<int64_t>(), batch, height, width,
                            static_cast<PaddingMode>(padding_mode));
  const auto fill = [&]<class T>(T* data) { fill_rows(data, batch * tokens, tokens, targets); };
  switch (dtype) {
    case ScalarType::Double: fill(out.mutable_data_ptr<double>()); break;
    case ScalarType::Float: fill(out.mutable_data_ptr<float>()); break;
    case ScalarType::Half: fill(out.mutable_data_ptr<torch::headeronly::Half>()); break;
    case ScalarType::BFloat16: fill(out.mutable_data_ptr<torch::headeronly::BFloat16>()); break;
    case ScalarType::Bool: fill(out.mutable_data_ptr<bool>()); break;
    default: STD_TORCH_CHECK(false, "convinit: dtype must be float64, float32, float16, bfloat16 or bool");
  }
  return out;
}

}  // namespace convinit
