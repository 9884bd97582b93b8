#include "impulse_matrix.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "huge_pages.h"

namespace convinit {
namespace {

// The targets of all offsets along both axes: [B, height] and [B, width].
struct AxisTargets {
  std::vector<int> rows, columns;
  int64_t height, width;

  AxisTargets(const int64_t* offsets, int64_t batch, int64_t height, int64_t width, PaddingMode mode)
      : rows(batch * height), columns(batch * width), height(height), width(width) {
    for (int64_t b = 0; b < batch; ++b) {
      const AxisTarget row(offsets[2 * b], static_cast<int>(height), mode);
      const AxisTarget column(offsets[2 * b + 1], static_cast<int>(width), mode);
      for (int i = 0; i < height; ++i) rows[b * height + i] = row(i);
      for (int j = 0; j < width; ++j) columns[b * width + j] = column(j);
    }
  }

  // Calls visit(row, column) for the rows in [begin, end) of the [B * N, N] result that have a 1. Rows are counted up,
  // not divided: the divisions would cost as much as writing short rows.
  template <class Visit>
  void for_each_one(int64_t begin, int64_t end, Visit visit) const {
    int64_t band = begin / width;  // = b * height + i
    int64_t position = begin % width;
    int64_t in_image = band % height;
    const int* column = &columns[band / height * width];
    for (int64_t row = begin; row < end; ++band) {
      const int64_t y = rows[band], count = std::min(width - position, end - row);
      if (y != kOutside) {
        for (int64_t j = position; j < position + count; ++j) {
          if (column[j] != kOutside) visit(row + j - position, y * width + column[j]);
        }
      }
      row += count;
      position = 0;
      if (++in_image == height) {
        in_image = 0;
        column += width;
      }
    }
  }
};

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
      targets.for_each_one(first, last,
                           [&](int64_t row, int64_t column) { out[row * columns + column] = static_cast<T>(1); });
    }
  });
}

}  // namespace

Tensor impulse_matrix_cpu(const Tensor& offsets, int64_t height, int64_t width, int64_t padding_mode,
                          ScalarType dtype) {
  check_impulse_matrix(offsets, height, width, padding_mode);
  const int64_t batch = offsets.size(0), tokens = height * width;
  Tensor out = torch::stable::new_empty(offsets, {batch, tokens, tokens}, dtype);
  if (batch == 0) return out;

  const Tensor packed = offsets.is_contiguous() ? offsets : torch::stable::contiguous(offsets);
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
