// As much of CUDA as csrc's kernels use, in ordinary C++: the tests compile a kernel's own source with it and run it
// where there is no GPU (Linux). A thread block is an operating-system thread, its CUDA threads are fibers that take turns at
// barriers and shuffles; blocks run at the same time, as a cooperative launch wants. It checks arithmetic, indices,
// the use of uninitialised memory, and that all threads reach each barrier; not speed, nor races within a turn.
#pragma once

#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ thread_local

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline thread_local dim3 threadIdx, blockIdx, gridDim;
using std::max, std::min;

namespace cuda_on_cpu {

constexpr size_t kStack = 64 * 1024;

// What a test chooses: the device's size, and whether threads take turns from the first to the last or back. A missing
// barrier shows in one of the two orders.
inline int multiprocessors = 4, shared_limit = 96 * 1024;
inline bool backwards = false;

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf where;
  bool started = false, done = false;
};

// The fibers of one block, in a ring.
struct Block {
  std::vector<Fiber> fibers;
  ucontext_t outside;
  void (*entry)(void*) = nullptr;
  void* argument = nullptr;
  unsigned now = 0;
  long idle = 0;
  struct Barrier {
    unsigned arrived = 0, generation = 0;
  };
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<double> lanes;  // what a shuffle exchanges
  bool vote = true, result = true;

  static void begin();
  void resume(unsigned next) {
    now = next;
    threadIdx = dim3(next);
    Fiber& fiber = fibers[next];
    if (fiber.started) _longjmp(fiber.where, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  // To the next fiber that is not done; back to `run` when all are.
  void leave() {
    for (unsigned i = 1; i <= fibers.size(); ++i) {
      const unsigned next = (now + (backwards ? fibers.size() - i : i)) % fibers.size();
      if (!fibers[next].done) resume(next);
    }
    setcontext(&outside);
  }
  void yield() {
    if (++idle > 100 * static_cast<long>(fibers.size())) {
      std::fprintf(stderr, "block %u: some threads never reach the barrier where others wait\n", blockIdx.x);
      std::abort();
    }
    if (_setjmp(fibers[now].where) == 0) leave();
  }
  void wait(Barrier& barrier, unsigned size) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == size) {
      barrier.arrived = 0;
      ++barrier.generation;
      idle = 0;
    }
    while (barrier.generation == generation) yield();
  }
  void run(unsigned threads, void (*function)(void*), void* data) {
    entry = function;
    argument = data;
    warps.resize((threads + 31) / 32);
    lanes.resize(threads);
    fibers.resize(threads);
    for (Fiber& fiber : fibers) {
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get();
      fiber.start.uc_stack.ss_size = kStack;
      makecontext(&fiber.start, &Block::begin, 0);
    }
    volatile bool entered = false;
    getcontext(&outside);
    if (!entered) {
      entered = true;
      resume(backwards ? threads - 1 : 0);
    }
  }
};
inline thread_local Block* block = nullptr;
inline void Block::begin() {
  Block& self = *block;
  self.entry(self.argument);
  self.fibers[self.now].done = true;
  self.idle = 0;
  self.leave();
}

// Fills shared memory with 0xff, NaN in floating point, so that what is read before it is written shows. It is this
// library's thread-local storage without an initial value; what else lies there is set after.
inline void poison_shared_memory() {
  block = nullptr;  // a thread's storage is made when it is first touched
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void*) {
        const char* const storage = static_cast<const char*>(library->dlpi_tls_data);
        for (int i = 0; i < library->dlpi_phnum; ++i) {
          const auto& part = library->dlpi_phdr[i];
          const char* const mine = reinterpret_cast<const char*>(&block);
          if (part.p_type != PT_TLS || mine < storage || mine >= storage + part.p_memsz) continue;
          std::memset(static_cast<char*>(library->dlpi_tls_data) + part.p_filesz, 0xff, part.p_memsz - part.p_filesz);
        }
        return 0;
      },
      nullptr);
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::block->wait(cuda_on_cpu::block->all, cuda_on_cpu::block->fibers.size()); }
inline int __syncthreads_and(int predicate) {
  auto& block = *cuda_on_cpu::block;
  block.vote = block.vote && predicate;
  __syncthreads();
  const bool result = block.vote;
  __syncthreads();
  block.vote = true;
  __syncthreads();
  return result;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  auto& block = *cuda_on_cpu::block;
  auto& barrier = block.warps[threadIdx.x / 32];
  const unsigned me = threadIdx.x;
  std::memcpy(&block.lanes[me], &value, sizeof(T));
  block.wait(barrier, 32);
  T other;
  std::memcpy(&other, &block.lanes[me ^ mask], sizeof(T));
  block.wait(barrier, 32);
  return other;
}
template <class T>
void __stcs(T* to, const T& value) {
  *to = value;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) { std::this_thread::yield(); }
inline unsigned atomicAdd(unsigned* to, unsigned x) { return __atomic_fetch_add(to, x, __ATOMIC_SEQ_CST); }

// The run-time library.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };
struct cudaFuncAttributes {
  size_t sharedSizeBytes = 0;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_on_cpu::multiprocessors : cuda_on_cpu::shared_limit;
  return cudaSuccess;
}
template <class K>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, K) {
  return cudaSuccess;
}
template <class K>
cudaError_t cudaFuncSetAttribute(K, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class K>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, K, int, size_t) {
  return *blocks = 1, cudaSuccess;
}

template <class Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args), const Args& args) {
  struct Call {
    void (*kernel)(Args);
    const Args& args;
  } call{kernel, args};
  std::vector<std::thread> blocks;
  for (unsigned b = 0; b < config->gridDim.x; ++b)
    blocks.emplace_back([&, b] {
      cuda_on_cpu::Block block;
      cuda_on_cpu::poison_shared_memory();
      cuda_on_cpu::block = &block;
      blockIdx = dim3(b);
      gridDim = config->gridDim;
      block.run(
          config->blockDim.x,
          [](void* data) {
            Call& call = *static_cast<Call*>(data);
            call.kernel(call.args);
          },
          &call);
    });
  for (std::thread& block : blocks) block.join();
  return cudaSuccess;
}
