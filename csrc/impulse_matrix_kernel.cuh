// Impulse matrices [B, N, N] on CUDA: every byte of the result is written once, in 16-byte streaming stores.
//
// The result is one long run of bytes, cut into tiles of 16 KB that know nothing of rows: a row may begin anywhere in a
// tile, so that odd N and one-byte elements need no care. A thread block keeps a tile of zeros in shared memory, puts
// in the ones of the rows that meet it, copies it out, and leaves it zero again.
//
// The floor is memory: 8 heads on 64 x 64 tokens are 537 MB in float32, 125 us at an H200's 4.3 TB/s. At that rate a
// multiprocessor has 16 KB to write in about 860 cycles. A tile costs it 1,024 times a 16-byte load and two stores
// (some 100 issue cycles of its four schedulers, 384 cycles of its shared memory at 128 bytes a cycle) and some 80
// instructions per row, of which a tile meets one or two at N = 4,096, 17 at N = 256, in float32. No division is made
// per 16 bytes and none of 64 bits per tile. Eight blocks a multiprocessor hide the two barriers of a tile.
#pragma once

#include "axis_target.h"
#include "cta_group.cuh"

namespace convinit {

constexpr int kTileBytes = 16 * 1024;

struct ImpulseMatrixArgs {
  void* out;               // [batch, tokens, tokens], its elements as bits; 16-byte aligned
  const int64_t* offsets;  // [batch, 2]
  int64_t batch;
  int height, width;
  PaddingMode padding_mode;
  uint64_t one;  // the bits of a 1
  int blocks;

  CONVINIT_HD int64_t tokens() const { return static_cast<int64_t>(height) * width; }
  CONVINIT_HD int64_t elements() const { return batch * tokens() * tokens(); }
};

// An element of the result, element = (matrix * tokens + row) * tokens + column. Moves on without division.
struct MatrixPosition {
  int64_t matrix;
  unsigned row, column;

  __device__ MatrixPosition(int64_t element, unsigned tokens)
      : matrix(element / tokens / tokens), row(static_cast<unsigned>(element / tokens % tokens)),
        column(static_cast<unsigned>(element % tokens)) {}

  __device__ void advance(const MatrixPosition& step, unsigned tokens) {
    column += step.column;
    row += step.row;
    matrix += step.matrix;
    if (column >= tokens) column -= tokens, ++row;
    if (row >= tokens) row -= tokens, ++matrix;
  }
};

// The column of the 1 in a row of a matrix, or kOutside.
__device__ inline int64_t target(const ImpulseMatrixArgs& args, int64_t matrix, int row) {
  const int y = AxisTarget(args.offsets[2 * matrix], args.height, args.padding_mode)(row / args.width);
  const int x = AxisTarget(args.offsets[2 * matrix + 1], args.width, args.padding_mode)(row % args.width);
  return y == kOutside || x == kOutside ? kOutside : static_cast<int64_t>(y) * args.width + x;
}

// T: an unsigned integer as wide as an element.
template <class T>
__global__ void __launch_bounds__(kThreads) impulse_matrix_kernel(const __grid_constant__ ImpulseMatrixArgs args) {
  constexpr int kPerStore = sizeof(uint4) / sizeof(T), kPerTile = kTileBytes / sizeof(T);
  __shared__ uint4 tile[kTileBytes / sizeof(uint4)];
  T* tile_elements = reinterpret_cast<T*>(tile);
  for (int i = threadIdx.x; i < kPerTile / kPerStore; i += kThreads) tile[i] = make_uint4(0, 0, 0, 0);

  T* const out = static_cast<T*>(args.out);
  const unsigned tokens = static_cast<unsigned>(args.tokens());
  const int64_t elements = args.elements(), stride = static_cast<int64_t>(args.blocks) * kPerTile;
  int64_t begin = static_cast<int64_t>(blockIdx.x) * kPerTile;
  const MatrixPosition step(stride, tokens);
  for (MatrixPosition first(begin, tokens); begin < elements; begin += stride, first.advance(step, tokens)) {
    const int count = static_cast<int>(min(elements - begin, static_cast<int64_t>(kPerTile)));
    __syncthreads();  // the tile is all zero
    // Where the rows that meet the tile begin, the first of them before it.
    const int64_t first_row = -static_cast<int64_t>(first.column);
    int64_t row = threadIdx.x;
    for (; first_row + row * tokens < count; row += kThreads) {
      const unsigned n = first.row + static_cast<unsigned>(row);
      const int64_t column = target(args, first.matrix + n / tokens, static_cast<int>(n % tokens));
      const int64_t at = first_row + row * tokens + column;
      if (column != kOutside && at >= 0 && at < count) tile_elements[at] = static_cast<T>(args.one);
    }
    __syncthreads();
    uint4* const out_tile = reinterpret_cast<uint4*>(out + begin);
#pragma unroll 4
    for (int i = threadIdx.x; i < count / kPerStore; i += kThreads) {
      __stcs(out_tile + i, tile[i]);
      tile[i] = make_uint4(0, 0, 0, 0);
    }
    const int tail = count / kPerStore * kPerStore + threadIdx.x;  // only the last tile has one, and it is the last
    if (tail < count) out[begin + tail] = tile_elements[tail];
  }
}

template <class T>
cudaError_t launch_impulse_matrix(ImpulseMatrixArgs& args, cudaStream_t stream) {
  int device = 0, multiprocessors = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, impulse_matrix_kernel<T>, kThreads, 0);
  if (error != cudaSuccess) return error;
  const int64_t per_tile = kTileBytes / sizeof(T), tiles = (args.elements() + per_tile - 1) / per_tile;
  args.blocks = static_cast<int>(std::min<int64_t>(tiles, std::max(resident, 1) * multiprocessors));
  return launch(impulse_matrix_kernel<T>, args.blocks, 0, stream, false, args);
}

inline cudaError_t launch_impulse_matrix(ImpulseMatrixArgs& args, int itemsize, cudaStream_t stream) {
  switch (itemsize) {
    case 1: return launch_impulse_matrix<uint8_t>(args, stream);
    case 2: return launch_impulse_matrix<uint16_t>(args, stream);
    case 4: return launch_impulse_matrix<uint32_t>(args, stream);
    default: return launch_impulse_matrix<uint64_t>(args, stream);
  }
}

}  // namespace convinit
