// A few thread blocks (CTAs) that work on one problem in one cooperative launch: barrier and sums.
//
// They meet at a counter in global memory, which every architecture has (thread block clusters begin at sm_90), and at
// which as many CTAs as the device can hold at once may meet. Sums are taken in a fixed order, without float atomics:
// all CTAs see the same bits, so that all take the same branches, and a second run sees them again.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>

namespace convinit {

#ifndef CONVINIT_THREADS
#define CONVINIT_THREADS 256
#endif
constexpr int kThreads = CONVINIT_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxCtas = 32;  // of one group
constexpr int kMaxSums = 72;  // taken at once
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int warp() { return threadIdx.x / 32; }

template <class T>
__device__ T warp_sum(T x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// Runs f on one thread of the CTA; all see what it wrote.
template <class F>
__device__ void once_per_cta(F&& f) {
  __syncthreads();
  if (threadIdx.x == 0) f();
  __syncthreads();
}

class CtaGroup {
 public:
  struct Shared {
    double parts[kWarps][kMaxSums];
    double sums[kMaxSums];
  };
  static constexpr int kExchange = 2 * kMaxCtas * kMaxSums;  // doubles of global memory

  // All CTAs of a group give the same counter, zero at the start of the kernel, and the same exchange.
  __device__ CtaGroup(int size, int rank, unsigned* counter, double* exchange, Shared& shared)
      : size(size), rank(rank), counter_(counter), exchange_(exchange), shared_(shared) {}

  const int size, rank;

  // Waits for all threads of the group. What they wrote before, all may read after.
  __device__ void sync() {
    __syncthreads();
    if (size == 1) return;
    if (threadIdx.x == 0) {
      awaited_ += size;
      __threadfence();
      atomicAdd(counter_, 1u);
      while (static_cast<int>(*static_cast<volatile unsigned*>(counter_) - awaited_) < 0) __nanosleep(20);
      __threadfence();
    }
    __syncthreads();
  }

  // This thread's share of sum i. Every thread of the CTA calls it with the same i.
  __device__ void add(int i, double x) {
    x = warp_sum(x);
    if (lane() == 0) shared_.parts[warp()][i] = x;
  }
  // Sum i of this CTA, known to one thread; instead of `add`.
  __device__ void set(int i, double x) {
    shared_.parts[0][i] = x;
    for (int w = 1; w < kWarps; ++w) shared_.parts[w][i] = 0;
  }

  // Sums 0 to count - 1 over the group, valid until the next call. It is a barrier like `sync`.
  __device__ const double* sums(int count) {
    // Two buffers in turn: a CTA that is one barrier ahead must not overwrite what another still reads.
    double* buffer = exchange_ + (turn_++ % 2) * kMaxCtas * kMaxSums;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kThreads) {
      double sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += shared_.parts[w][i];
      buffer[rank * kMaxSums + i] = sum;
    }
    sync();
    for (int i = threadIdx.x; i < count; i += kThreads) {
      double sum = 0;
      for (int r = 0; r < size; ++r) sum += buffer[r * kMaxSums + i];
      shared_.sums[i] = sum;
    }
    __syncthreads();
    return shared_.sums;
  }

 private:
  unsigned* counter_;
  double* exchange_;
  Shared& shared_;
  unsigned awaited_ = 0, turn_ = 0;
};

// How many groups of how many CTAs a launch has, and where their tiles lie.
struct GroupPlan {
  int groups = 1, ctas = 1;
  size_t shared_bytes = 0;  // dynamic shared memory for the tiles of a CTA, or 0 where they exceed it
  size_t tile_bytes = 0;    // global memory for the tiles of a CTA instead

  int blocks() const { return groups * ctas; }
};

// Spreads the problems over the device: each over up to `most_ctas` CTAs, as many at a time as it can hold.
template <class Args>
cudaError_t plan_groups(void (*kernel)(Args), int problems, int most_ctas, size_t tile_bytes, GroupPlan& plan) {
  int device = 0, multiprocessors = 0, largest = 0, resident = 0;
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&largest, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  const bool fits = attributes.sharedSizeBytes + tile_bytes <= static_cast<size_t>(largest);
  plan.shared_bytes = fits ? tile_bytes : 0;
  plan.tile_bytes = fits ? 0 : tile_bytes;
  // The limit belongs to the kernel, not to this launch: always the same, or calls of other sizes in other threads and
  // launches captured before would lose theirs.
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               largest - static_cast<int>(attributes.sharedSizeBytes));
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, plan.shared_bytes);
  if (error != cudaSuccess) return error;
  const int capacity = std::max(resident * multiprocessors, 1);
  const int wanted = std::clamp(capacity / problems, 1, std::min(most_ctas, kMaxCtas));
  const int rounds = (most_ctas + wanted - 1) / wanted;  // fewer CTAs that are all busy in each round do as well
  plan.ctas = (most_ctas + rounds - 1) / rounds;
  plan.groups = std::min(problems, capacity / plan.ctas);
  return cudaSuccess;
}

template <class Args>
cudaError_t launch(void (*kernel)(Args), int blocks, size_t shared_bytes, cudaStream_t stream, bool cooperative,
                   const Args& args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

// Hands out parts of a block of device memory, or with no block counts what they need.
class Carver {
 public:
  explicit Carver(void* begin = nullptr) : begin_(static_cast<char*>(begin)) {}

  template <class T>
  T* take(size_t count) {
    T* part = begin_ == nullptr ? nullptr : reinterpret_cast<T*>(begin_ + bytes_);
    bytes_ += (count * sizeof(T) + 255) / 256 * 256;
    return part;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* begin_;
  size_t bytes_ = 0;
};

}  // namespace convinit
