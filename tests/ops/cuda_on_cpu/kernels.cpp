// csrc's kernels as plain functions, for tests/ops/test_cuda_on_cpu.py.
#define CONVINIT_THREADS 64

#include <cuda_runtime.h>

#include "impulse_conv_kernel.cuh"
#include "impulse_matrix_kernel.cuh"
#include "qk_solver_kernel.cuh"

namespace convinit {
thread_local float4 dynamic_shared[16 * 1024];
}

using namespace convinit;

namespace {

// Workspace of NaN: what is read before it is written shows.
struct Workspace {
  explicit Workspace(size_t bytes) : memory(std::aligned_alloc(256, bytes)) { std::memset(memory, 0xff, bytes); }
  ~Workspace() { std::free(memory); }
  void* memory;
};

// Plans, gives the workspace, launches. Returns the CTAs of a group, or -1.
template <class Args>
int run(Args& args, cudaError_t (*plan)(Args&), cudaError_t (*launch)(const Args&, cudaStream_t)) {
  if (plan(args) != cudaSuccess) return -1;
  Carver size;
  args.carve(size);
  Workspace workspace(size.bytes());
  Carver carver(workspace.memory);
  args.carve(carver);
  return launch(args, nullptr) == cudaSuccess ? args.plan.ctas : -1;
}

}  // namespace

extern "C" void set_device(int multiprocessors, int shared_limit, int backwards) {
  cuda_on_cpu::multiprocessors = multiprocessors;
  cuda_on_cpu::shared_limit = shared_limit;
  cuda_on_cpu::backwards = backwards;
}

extern "C" bool impulse_matrix(void* out, const int64_t* offsets, int64_t batch, int height, int width,
                               int64_t padding_mode, uint64_t one, int itemsize) {
  ImpulseMatrixArgs args{};
  args.out = out;
  args.offsets = offsets;
  args.batch = batch;
  args.height = height;
  args.width = width;
  args.padding_mode = static_cast<PaddingMode>(padding_mode);
  args.one = one;
  return launch_impulse_matrix(args, itemsize, nullptr) == cudaSuccess;
}

// dtype: 0 to 3, float64, float32, float16, bfloat16.
extern "C" bool impulse_conv(void* out, const void* x, const int64_t* offsets, const void* gain, const void* bias,
                             int64_t batch, int64_t channels, int height, int width, bool channels_last, int dtype) {
  ImpulseConvArgs args{};
  args.out = out;
  args.x = x;
  args.offsets = offsets;
  args.gain = gain;
  args.bias = bias;
  args.batch = batch;
  args.channels = channels;
  args.height = height;
  args.width = width;
  args.channels_last = channels_last;
  switch (dtype) {
    case 0: return launch_impulse_conv<PlainElement<double>>(args, nullptr) == cudaSuccess;
    case 1: return launch_impulse_conv<PlainElement<float>>(args, nullptr) == cudaSuccess;
    case 2: return launch_impulse_conv<HalfElement>(args, nullptr) == cudaSuccess;
    default: return launch_impulse_conv<BFloat16Element>(args, nullptr) == cudaSuccess;
  }
}

extern "C" int qk_solver(int n, int dq, int dk, int rank, double scale, int starts, int problems, const double* xq,
                         const double* xk, const int64_t* targets, const double* wq_starts, const double* wk_starts,
                         const double* weight_norm, double peak, int64_t max_iterations, double tolerance, double* wq,
                         double* wk, double* diagnostics) {
  QKSolverArgs args{};
  args.shape = {n, dq, dk, rank, static_cast<float>(scale)};
  args.options = {.peak = peak, .num_starts = starts, .max_iterations = max_iterations, .tolerance = tolerance};
  args.problems = problems;
  args.xq = xq;
  args.xk = xk;
  args.targets = targets;
  args.wq_starts = wq_starts;
  args.wk_starts = wk_starts;
  args.weight_norm = weight_norm;
  args.wq = wq;
  args.wk = wk;
  args.diagnostics = diagnostics;
  return run(args, plan_qk_solver, launch_qk_solver);
}
