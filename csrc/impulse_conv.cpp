#include "impulse_conv.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "axis_target.h"
#include "elements.h"
#include "huge_pages.h"
#include "instruction_sets.h"

namespace convinit {
namespace {

// The dtype of the arithmetic.
template <class T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Image {
  int64_t batch, channels;
  int height, width;

  int64_t pixels() const { return static_cast<int64_t>(height) * width; }
};

// What is done to each channel. Without gain and bias values are copied, bit by bit.
template <class T>
struct Channels {
  std::vector<int> dy, dx;
  std::vector<Real<T>> gain, bias;
  bool copies;

  Channels(const Image& image, const int64_t* offsets, const Real<T>* gains, const Real<T>* biases)
      : gain(image.channels, 1), bias(image.channels, 0), copies(gains == nullptr && biases == nullptr) {
    for (int64_t c = 0; c < image.channels; ++c) {
      dy.push_back(axis_shift(offsets[2 * c], image.height));
      dx.push_back(axis_shift(offsets[2 * c + 1], image.width));
    }
    if (gains != nullptr) std::copy_n(gains, image.channels, gain.begin());
    if (biases != nullptr) std::copy_n(biases, image.channels, bias.begin());
  }
};

template <class T>
T affine(T x, Real<T> gain, Real<T> bias) {
  return static_cast<T>(gain * static_cast<Real<T>>(x) + bias);
}

template <int W>
CONVINIT_INLINE void affine_halves(Element element, uint16_t* out, const uint16_t* x, int64_t count, float gain,
                                   float bias) {
  const int64_t whole = count / W * W;
  for (int64_t p = 0; p < whole; p += W)
    simd::store_elements<W>(element, out + p, gain * simd::load_elements<W>(element, x + p) + bias);
  uint16_t tail[W] = {};
  std::copy(x + whole, x + count, tail);
  simd::store_elements<W>(element, tail, gain * simd::load_elements<W>(element, tail) + bias);
  std::copy_n(tail, count - whole, out + whole);
}

#define CONVINIT_AFFINE(set, width, T, mark)                                                                         \
  mark void affine_##set(Element element, uint16_t* out, const uint16_t* x, int64_t count, float gain, float bias) { \
    element == Element::float16 ? affine_halves<width>(Element::float16, out, x, count, gain, bias)                  \
                                : affine_halves<width>(Element::bfloat16, out, x, count, gain, bias);                \
  }
CONVINIT_EACH_VECTOR_WIDTH(CONVINIT_AFFINE)

auto best_affine() {
#define CONVINIT_CHOICE(set, width, T, mark) \
  case InstructionSet::set: return affine_##set;
  switch (best_instruction_set(false)) {
    CONVINIT_EACH_VECTOR_WIDTH(CONVINIT_CHOICE)
    default: return affine_baseline;
  }
#undef CONVINIT_CHOICE
}

// 16-bit numbers are converted in the widest vectors. Others are not: most would lie in two lines of the cache.
template <class T>
void affine_run(T* __restrict out, const T* __restrict x, int64_t count, Real<T> gain, Real<T> bias) {
  if constexpr (sizeof(T) == sizeof(uint16_t)) {
    static const auto run = best_affine();
    constexpr bool half = std::is_same_v<T, torch::headeronly::Half>;
    run(half ? Element::float16 : Element::bfloat16, &out->x, &x->x, count, gain, bias);
  } else {
    for (int64_t p = 0; p < count; ++p) out[p] = affine(x[p], gain, bias);
  }
}

// One plane [H, W]. The shift moves all of its values by dy W + dx places: one long loop, however short the rows, that
// also writes what would have come from the next or the last row; those columns are set after.
template <class T>
void shift_plane(T* __restrict out, const T* __restrict x, const Image& image, const Channels<T>& channels, int64_t c) {
  const int64_t width = image.width, dy = channels.dy[c], dx = channels.dx[c];
  const Real<T> gain = channels.gain[c], bias = channels.bias[c];
  const T outside = static_cast<T>(bias);
  const int64_t top = std::max<int64_t>(-dy, 0), bottom = image.height - std::max<int64_t>(dy, 0);
  const int64_t left = std::max<int64_t>(-dx, 0), right = std::max<int64_t>(dx, 0);
  if (top >= bottom || left + right >= width) {
    std::fill_n(out, image.pixels(), outside);
    return;
  }
  const int64_t begin = top * width + left, end = bottom * width - right;
  const T* const from = x + (begin + dy * width + dx);
  std::fill_n(out, begin, outside);
  if (channels.copies) {
    std::copy_n(from, end - begin, out + begin);
  } else {
    affine_run(out + begin, from, end - begin, gain, bias);
  }
  // Column by column: of a small shift a row has one or two, too few for a loop of their own.
  for (int64_t column = -right; column < left; ++column)
    for (int64_t row = top + 1; row < bottom; ++row) out[row * width + column] = outside;
  std::fill(out + end, out + image.pixels(), outside);
}

constexpr int64_t kGrainBytes = 64 * 1024;  // at least, for a thread

template <class T>
void shift_planes(T* out, const T* x, const Image& image, const Channels<T>& channels) {
  const int64_t plane_bytes = image.pixels() * static_cast<int64_t>(sizeof(T));
  torch::stable::parallel_for(0, image.batch * image.channels, std::max<int64_t>(kGrainBytes / plane_bytes, 1),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t plane = begin; plane < end; ++plane) {
                                  const int64_t at = plane * image.pixels();
                                  shift_plane(out + at, x + at, image, channels, plane % image.channels);
                                }
                              });
}

// Channels side by side, [B, H, W, C], each from another pixel. A block of channels of one image is copied into a frame
// of zeros as wide as the offsets; from there on a channel's distance is one number for all pixels, and what is read
// together lies together, in the innermost caches.
template <class T>
class Frame {
 public:
  static constexpr int64_t kBlock = 512 / sizeof(T);  // channels

  Frame(const Image& image, const Channels<T>& channels)
      : image_(image), channels_(channels),
        top_(std::max(0, -*std::min_element(channels.dy.begin(), channels.dy.end()))),
        left_(std::max(0, -*std::min_element(channels.dx.begin(), channels.dx.end()))),
        width_(image.width + left_ + std::max(0, *std::max_element(channels.dx.begin(), channels.dx.end()))),
        height_(image.height + top_ + std::max(0, *std::max_element(channels.dy.begin(), channels.dy.end()))) {}

  int64_t pixels() const { return height_ * width_; }

  void shift(T* out, const T* x) const {
    const int64_t blocks = (image_.channels + kBlock - 1) / kBlock;
    const int64_t block_bytes = image_.pixels() * kBlock * static_cast<int64_t>(sizeof(T));
    torch::stable::parallel_for(0, image_.batch * blocks, std::max<int64_t>(kGrainBytes / block_bytes, 1),
                                [&](int64_t begin, int64_t end) {
                                  std::vector<T> frame(pixels() * kBlock, T(0));
                                  for (int64_t task = begin; task < end; ++task) {
                                    const int64_t at = task / blocks * image_.pixels() * image_.channels;
                                    shift_block(out + at, x + at, task % blocks * kBlock, frame.data());
                                  }
                                });
  }

 private:
  void shift_block(T* out, const T* x, int64_t first, T* __restrict frame) const {
    const int64_t count = std::min(kBlock, image_.channels - first);
    int64_t distance[kBlock] = {};
    Real<T> gain[kBlock] = {}, bias[kBlock] = {};
    for (int64_t c = 0; c < count; ++c) {
      distance[c] = (channels_.dy[first + c] * width_ + channels_.dx[first + c]) * kBlock + c;
      gain[c] = channels_.gain[first + c];
      bias[c] = channels_.bias[first + c];
    }
    for (int64_t i = 0; i < image_.height; ++i) {
      T* to = frame + ((i + top_) * width_ + left_) * kBlock;
      const T* from = x + i * image_.width * image_.channels + first;
      for (int64_t j = 0; j < image_.width; ++j, to += kBlock, from += image_.channels) std::copy_n(from, count, to);
    }
    for (int64_t i = 0; i < image_.height; ++i) {
      const T* from = frame + ((i + top_) * width_ + left_) * kBlock;
      T* __restrict to = out + i * image_.width * image_.channels + first;
      for (int64_t j = 0; j < image_.width; ++j, from += kBlock, to += image_.channels) {
        if (channels_.copies) {
          for (int64_t c = 0; c < count; ++c) to[c] = from[distance[c]];
        } else {
          for (int64_t c = 0; c < count; ++c) to[c] = affine(from[distance[c]], gain[c], bias[c]);
        }
      }
    }
  }

  const Image& image_;
  const Channels<T>& channels_;
  int64_t top_, left_, width_, height_;
};

template <class T>
Tensor shift(const Tensor& x, const Tensor& offsets, const std::optional<Tensor>& gain,
             const std::optional<Tensor>& bias) {
  ImpulseConvTensors tensors(x, offsets);
  if (x.numel() == 0) return tensors.out;
  const Image image{x.size(0), x.size(1), static_cast<int>(x.size(2)), static_cast<int>(x.size(3))};
  const auto reals = [](const std::optional<Tensor>& t) { return t ? t->const_data_ptr<Real<T>>() : nullptr; };
  const auto gains = for_arithmetic(gain, x), biases = for_arithmetic(bias, x);
  const Channels<T> channels(image, tensors.offsets.const_data_ptr<int64_t>(), reals(gains), reals(biases));

  if (tensors.channels_last) {
    const Frame<T> frame(image, channels);
    const bool finite =
        std::all_of(channels.gain.begin(), channels.gain.end(), [](Real<T> g) { return std::isfinite(g); });
    // A frame has whole blocks of channels, and its zeros are multiplied.
    if (image.channels >= Frame<T>::kBlock && frame.pixels() <= 4 * image.pixels() && finite) {
      prefer_huge_pages(tensors.out.data_ptr(), x.numel() * static_cast<int64_t>(sizeof(T)));
      frame.shift(tensors.out.mutable_data_ptr<T>(), tensors.x.const_data_ptr<T>());
      return tensors.out;
    }
    // Few channels, or offsets almost as large as the image: the frame would be mostly zeros.
    const Tensor planes = shift<T>(torch::stable::contiguous(x), offsets, gain, bias);
    return torch::stable::copy_(tensors.out, planes);
  }
  prefer_huge_pages(tensors.out.data_ptr(), x.numel() * static_cast<int64_t>(sizeof(T)));
  shift_planes(tensors.out.mutable_data_ptr<T>(), tensors.x.const_data_ptr<T>(), image, channels);
  return tensors.out;
}

}  // namespace

Tensor impulse_conv_cpu(const Tensor& x, const Tensor& offsets, const std::optional<Tensor>& gain,
                        const std::optional<Tensor>& bias) {
  check_impulse_conv(x, offsets, gain, bias);
  switch (x.scalar_type()) {
    case ScalarType::Double: return shift<double>(x, offsets, gain, bias);
    case ScalarType::Float: return shift<float>(x, offsets, gain, bias);
    case ScalarType::Half: return shift<torch::headeronly::Half>(x, offsets, gain, bias);
    case ScalarType::BFloat16: return shift<torch::headeronly::BFloat16>(x, offsets, gain, bias);
    default: STD_TORCH_CHECK(false, "convinit: x must be float64, float32, float16 or bfloat16");
  }
}

}  // namespace convinit
