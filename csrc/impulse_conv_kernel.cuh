// impulse_conv on CUDA: out[b, c, i, j] = gain[c] x[b, c, i + dy_c, j + dx_c] + bias[c].
//
// A thread writes 4 elements at once (2 of float64) where the sizes allow it, else one: neighbours in a plane, or with
// channels last neighbours in a pixel. It reads them one by one, for the source begins at any element; a warp's reads of a plane
// lie together all the same. A thread's place moves on without 64-bit divisions.
#pragma once

#include <cstring>

#include "axis_target.h"
#include "cta_group.cuh"

namespace convinit {

struct ImpulseConvArgs {
  void* out;                // [B, C, H, W], or with channels_last [B, H, W, C]; 16-byte aligned
  const void* x;            // the same
  const int64_t* offsets;   // [C, 2]
  const void *gain, *bias;  // [C] or null, in the dtype of the arithmetic
  int64_t batch, channels;
  int height, width;
  bool channels_last;
  int blocks;

  CONVINIT_HD int64_t pixels() const { return static_cast<int64_t>(height) * width; }
};

template <class To, class From>
__device__ To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// How an element lies in memory, and the type of the arithmetic.
template <class T>
struct PlainElement {
  using Stored = T;
  using Real = T;
  static __device__ Real load(Stored x) { return x; }
  static __device__ Stored store(Real y) { return y; }
};

struct BFloat16Element {
  using Stored = uint16_t;
  using Real = float;
  static __device__ float load(uint16_t x) { return same_bits<float>(static_cast<uint32_t>(x) << 16); }
  static __device__ uint16_t store(float y) {
    const uint32_t bits = same_bits<uint32_t>(y);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // ties to even
  }
};

struct HalfElement {
  using Stored = uint16_t;
  using Real = float;
  static __device__ float load(uint16_t x) {
    const uint32_t magnitude = (x & 0x7fffu) << 13, sign = (x & 0x8000u) << 16;
    const bool finite = magnitude < 0x0f800000;
    const uint32_t bits =
        finite ? same_bits<uint32_t>(same_bits<float>(magnitude) * 0x1p112f) : magnitude + (224u << 23);
    return same_bits<float>(bits | sign);
  }
  static __device__ uint16_t store(float y) {
    const uint32_t bits = same_bits<uint32_t>(y), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    uint32_t rounded;
    if (magnitude > 0x7f800000) {
      rounded = 0x7e00;  // NaN
    } else if (magnitude >= 0x47800000) {
      rounded = 0x7c00;  // 2^16 and more: infinity
    } else if (magnitude < 0x38800000) {
      rounded = same_bits<uint32_t>(same_bits<float>(magnitude) + 0.5f) - 0x3f000000;  // below 2^-14: steps of 2^-24
    } else {
      rounded = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    }
    return static_cast<uint16_t>(rounded | sign);
  }
};

// The parts of a result, counted in the order of memory: image, then plane and part of the plane, or with channels last
// pixel and part of the pixel.
struct PartPosition {
  int64_t image, middle, part;

  __device__ PartPosition(int64_t index, int64_t middles, int64_t parts)
      : image(index / parts / middles), middle(index / parts % middles), part(index % parts) {}

  __device__ void advance(const PartPosition& step, int64_t middles, int64_t parts) {
    part += step.part;
    middle += step.middle;
    image += step.image;
    if (part >= parts) part -= parts, ++middle;
    if (middle >= middles) middle -= middles, ++image;
  }
};

// One element of the result: of one image, at x, whose neighbours in a row, a column are `pixel` apart.
template <class E>
__device__ typename E::Stored seen(const ImpulseConvArgs& args, const typename E::Stored* x, int64_t channel, int i,
                                   int j, int64_t pixel) {
  using Real = typename E::Real;
  const int64_t y = static_cast<int64_t>(i) + axis_shift(args.offsets[2 * channel], args.height);
  const int64_t z = static_cast<int64_t>(j) + axis_shift(args.offsets[2 * channel + 1], args.width);
  const bool inside = y >= 0 && y < args.height && z >= 0 && z < args.width;
  const typename E::Stored value = inside ? x[(y * args.width + z) * pixel] : typename E::Stored(0);
  if (args.gain == nullptr && args.bias == nullptr) return value;
  const Real bias = args.bias == nullptr ? Real(0) : static_cast<const Real*>(args.bias)[channel];
  if (!inside) return E::store(bias);  // also where gain is infinite
  const Real gain = args.gain == nullptr ? Real(1) : static_cast<const Real*>(args.gain)[channel];
  return E::store(gain * E::load(value) + bias);
}

// Count: elements of a part.
template <class E, int Count>
__global__ void __launch_bounds__(kThreads) impulse_conv_kernel(const __grid_constant__ ImpulseConvArgs args) {
  using Stored = typename E::Stored;
  struct alignas(Count * sizeof(Stored)) Part {
    Stored values[Count];
  };
  const int64_t pixels = args.pixels(), image_size = args.channels * pixels;
  const int64_t middles = args.channels_last ? pixels : args.channels;
  const int64_t parts = (args.channels_last ? args.channels : pixels) / Count;
  const int64_t all = args.batch * middles * parts, stride = static_cast<int64_t>(args.blocks) * kThreads;
  const unsigned width = args.width;
  int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const PartPosition step(stride, middles, parts);
  for (PartPosition at(index, middles, parts); index < all; index += stride, at.advance(step, middles, parts)) {
    const Stored* const image = static_cast<const Stored*>(args.x) + at.image * image_size;
    Part part;
    if (args.channels_last) {
      const int i = static_cast<unsigned>(at.middle) / width, j = static_cast<unsigned>(at.middle) % width;
#pragma unroll
      for (int k = 0; k < Count; ++k) {
        const int64_t channel = at.part * Count + k;
        part.values[k] = seen<E>(args, image + channel, channel, i, j, args.channels);
      }
    } else {
      const unsigned first = static_cast<unsigned>(at.part) * Count;
      int i = first / width, j = first % width;
#pragma unroll
      for (int k = 0; k < Count; ++k) {
        part.values[k] = seen<E>(args, image + at.middle * pixels, at.middle, i, j, 1);
        if (++j == args.width) j = 0, ++i;
      }
    }
    static_cast<Part*>(args.out)[index] = part;
  }
}

template <class E, int Count>
cudaError_t launch_impulse_conv_parts(ImpulseConvArgs& args, cudaStream_t stream) {
  int device = 0, multiprocessors = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, impulse_conv_kernel<E, Count>, kThreads, 0);
  if (error != cudaSuccess) return error;
  const int64_t parts = args.batch * args.channels * args.pixels() / Count, wanted = (parts + kThreads - 1) / kThreads;
  args.blocks = static_cast<int>(std::min<int64_t>(wanted, std::max(resident, 1) * multiprocessors));
  return launch(impulse_conv_kernel<E, Count>, args.blocks, 0, stream, false, args);
}

template <class E>
cudaError_t launch_impulse_conv(ImpulseConvArgs& args, cudaStream_t stream) {
  constexpr int kCount = std::min<int>(16 / sizeof(typename E::Stored), 4);  // eight take more registers than there are
  const bool fits = (args.channels_last ? args.channels : args.pixels()) % kCount == 0;
  return fits ? launch_impulse_conv_parts<E, kCount>(args, stream) : launch_impulse_conv_parts<E, 1>(args, stream);
}

}  // namespace convinit
