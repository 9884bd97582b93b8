// The Q/K fit on CUDA: every problem is solved by a group of CTAs, from the choice of the start to the last iteration,
// in one launch. The search is that of the CPU (qk_search.h); here is the Space it works in.
//
// Each CTA keeps a slice of every vector and runs the search with the same numbers as the others of its group. One
// evaluation with its step costs five barriers: point, keys, map, gradient, inner products.
#pragma once

#include "lbfgs.h"
#include "qk_map.cuh"
#include "qk_search.h"

namespace convinit {

struct QKSolverArgs {
  MapShape shape;
  QKSolverOptions options;
  GroupPlan plan;
  int problems;
  const double *xq, *xk;                // [n, dq], [n, dk]
  const int64_t* targets;               // [problems, n]
  const double *wq_starts, *wk_starts;  // [starts, problems, dq or dk, rank]
  const double* weight_norm;            // [problems], or null with options.peak
  double *wq, *wk, *diagnostics;        // results: [problems, dq or dk, rank], [problems, kDiagnostics]

  unsigned* counters;  // workspace: [groups]
  double* exchange;    // [groups, CtaGroup::kExchange]
  float *xq_t, *xk_t;  // [dq or dk, ld]
  double* vectors;     // [groups, kVectors, size]
  float* pairs;        // [groups, LbfgsMemory::kGradient, size]
  float* maps;         // [groups, shape.workspace_floats]
  float* tiles;        // [groups, ctas, tile_floats], where they do not fit shared memory

  static constexpr int kVectors = 6;  // point, next, gradient, next_gradient, step, kept

  void carve(Carver& carver) {
    const size_t groups = plan.groups, size = shape.size();
    counters = carver.take<unsigned>(groups);
    exchange = carver.take<double>(groups * CtaGroup::kExchange);
    xq_t = carver.take<float>(static_cast<size_t>(shape.dq) * shape.ld());
    xk_t = carver.take<float>(static_cast<size_t>(shape.dk) * shape.ld());
    vectors = carver.take<double>(groups * kVectors * size);
    pairs = carver.take<float>(groups * LbfgsMemory::kGradient * size);
    maps = carver.take<float>(groups * shape.workspace_floats(plan.ctas));
    tiles = carver.take<float>(static_cast<size_t>(plan.blocks()) * plan.tile_bytes / sizeof(float));
  }
};

// The Space of lbfgs.h and qk_search.h. Vectors are [wq | wk], in float64 but for the pairs.
class DeviceProblem {
 public:
  double weight_norm = 1;
  QKMetrics metrics;
  int evaluations = 0;

  __device__ DeviceProblem(const QKSolverArgs& args, int group_index, CtaGroup& group, MapObjective& map)
      : args_(args), shape_(args.shape), group_(group), map_(map), size_(shape_.size()),
        split_(shape_.dq * shape_.rank) {
    const int share = (size_ + group.size - 1) / group.size;
    begin_ = min(group.rank * share, size_);
    end_ = min(begin_ + share, size_);
    double* vectors = args.vectors + static_cast<size_t>(group_index) * QKSolverArgs::kVectors * size_;
    point_ = vectors;
    next_ = vectors + size_;
    gradient_ = vectors + 2 * static_cast<size_t>(size_);
    next_gradient_ = vectors + 3 * static_cast<size_t>(size_);
    step_ = vectors + 4 * static_cast<size_t>(size_);
    kept_ = vectors + 5 * static_cast<size_t>(size_);
    pairs_ = args.pairs + static_cast<size_t>(group_index) * LbfgsMemory::kGradient * size_;
  }

  __device__ void take_problem(int problem) {
    problem_ = problem;
    target_ = args_.targets + static_cast<size_t>(problem) * shape_.n;
    evaluations = 0;
  }

  __device__ double evaluate() { return evaluate(point_, gradient_); }
  __device__ double value() { return evaluate(point_, nullptr); }
  __device__ double try_step(double length) {
    for_slice([&](int e) { next_[e] = point_[e] - length * step_[e]; });
    return evaluate(next_, next_gradient_);
  }

  __device__ void accept(int pair) {
    float *s = vector(pair), *y = vector(LbfgsMemory::change(pair));
    for_slice([&](int e) {
      s[e] = static_cast<float>(next_[e] - point_[e]);
      y[e] = static_cast<float>(next_gradient_[e] - gradient_[e]);
    });
    swap(point_, next_);
    swap(gradient_, next_gradient_);
  }

  // A warp takes the products of one vector with up to three others: the pair's and the gradient.
  __device__ __noinline__ void inner_products(LbfgsMemory& memory, int pair) {
    const bool with_pair = pair != LbfgsMemory::kNoPair;
    const int columns = 2 * (memory.count + with_pair) + 1;
    const auto column = [&](int i) {
      if (i == columns - 1) return LbfgsMemory::kGradient;
      return i % 2 == 0 ? memory.slot(i / 2) : LbfgsMemory::change(memory.slot(i / 2));
    };
    const float *s = vector(with_pair ? pair : 0), *y = vector(LbfgsMemory::change(with_pair ? pair : 0));
    __syncthreads();  // slices are complete
    for (int i = warp(); i < columns; i += kWarps) {
      const bool by_gradient = i == columns - 1;
      const float* v = by_gradient ? nullptr : vector(column(i));
      double products[3] = {};
      for (int e = begin_ + lane(); e < end_; e += 32) {
        const double x = by_gradient ? gradient_[e] : v[e];
        products[0] += x * gradient_[e];
        if (with_pair) {
          products[1] += x * s[e];
          products[2] += x * y[e];
        }
      }
      for (int row = 0; row < 3; ++row) {
        products[row] = warp_sum(products[row]);
        if (lane() == 0) group_.set(3 * i + row, products[row]);
      }
    }
    const double* total = group_.sums(3 * columns);
    for (int item = threadIdx.x; item < 3 * columns; item += kThreads) {
      const int i = item / 3, j = column(i);
      if (item % 3 > 0 && !with_pair) continue;
      const int row = item % 3 == 0 ? LbfgsMemory::kGradient : item % 3 == 1 ? pair : LbfgsMemory::change(pair);
      memory.gram[row][j] = total[item];
      if (i < columns - (with_pair ? 3 : 1)) memory.gram[j][row] = total[item];  // the others are rows themselves
    }  // `once`, where the matrix is read, begins with a barrier
  }

  __device__ void combine(const LbfgsMemory& memory) {
    for_slice([&](int e) {
      double sum = memory.weights[LbfgsMemory::kGradient] * gradient_[e];
      for (int i = 0; i < memory.count; ++i) {
        const int s = memory.slot(i), y = LbfgsMemory::change(s);
        sum += memory.weights[s] * vector(s)[e] + memory.weights[y] * vector(y)[e];
      }
      step_[e] = sum;
    });
  }

  template <class F>
  __device__ void once(F&& f) {
    once_per_cta(f);
  }

  __device__ void start(int64_t s) {
    const double* q = args_.wq_starts + (s * args_.problems + problem_) * split_;
    const double* k = args_.wk_starts + (s * args_.problems + problem_) * (size_ - split_) - split_;
    for_slice([&](int e) { point_[e] = e < split_ ? q[e] : k[e]; });
    normalise();
  }

  __device__ void normalise() {
    const Factors factors = factors_to(1.0, point_);
    for_slice([&](int e) { point_[e] *= e < split_ ? factors.q : factors.k; });
  }
  __device__ void keep() {
    for_slice([&](int e) { kept_[e] = point_[e]; });
  }
  __device__ void recall() {
    for_slice([&](int e) { point_[e] = kept_[e]; });
  }

  __device__ double natural_norm() {
    double squares[2] = {};
    for (int side = 0; side < 2; ++side) {
      const float* x = side == 0 ? args_.xq_t : args_.xk_t;
      const int count = (side == 0 ? shape_.dq : shape_.dk) * shape_.ld();
      for (int i = group_.rank * kThreads + threadIdx.x; i < count; i += group_.size * kThreads)
        squares[side] += static_cast<double>(x[i]) * x[i];
      group_.add(side, squares[side]);
    }
    const double* total = group_.sums(2);
    return 1.0 / sqrt(shape_.scale * sqrt(total[0] * total[1]) / shape_.n);
  }

  __device__ void write(int64_t iterations) {
    const Factors factors = factors_to(weight_norm, point_);
    double* q = args_.wq + static_cast<size_t>(problem_) * split_;
    double* k = args_.wk + static_cast<size_t>(problem_) * (size_ - split_) - split_;
    for_slice([&](int e) { (e < split_ ? q : k)[e] = point_[e] * (e < split_ ? factors.q : factors.k); });
    write_diagnostics(metrics.mse, metrics.peak, metrics.hit_rate, weight_norm, static_cast<double>(iterations),
                      evaluations);
  }

  // For targets that do not fit: no figure that could be taken for a result.
  __device__ void write_nan() {
    double* q = args_.wq + static_cast<size_t>(problem_) * split_;
    double* k = args_.wk + static_cast<size_t>(problem_) * (size_ - split_) - split_;
    for_slice([&](int e) { (e < split_ ? q : k)[e] = NAN; });
    write_diagnostics(NAN, NAN, NAN, NAN, 0, 0);
  }

 private:
  struct Factors {
    double q, k;
  };

  template <class F>
  __device__ void for_slice(F f) const {
    for (int e = begin_ + threadIdx.x; e < end_; e += kThreads) f(e);
  }

  __device__ static void swap(double*& a, double*& b) {
    double* const c = a;
    a = b;
    b = c;
  }

  __device__ float* vector(int i) const { return pairs_ + static_cast<size_t>(i) * size_; }

  // What x's two parts are to be multiplied by to have the given norm. It is a barrier.
  __device__ Factors factors_to(double norm, const double* x) {
    double squares[2] = {};
    for_slice([&](int e) { squares[e < split_ ? 0 : 1] += x[e] * x[e]; });
    group_.add(0, squares[0]);
    group_.add(1, squares[1]);
    const double* total = group_.sums(2);
    return {norm / fmax(sqrt(total[0]), 1e-300), norm / fmax(sqrt(total[1]), 1e-300)};
  }

  __device__ __noinline__ double evaluate(const double* x, double* gradient) {
    for_slice([&](int e) { map_.weights[e] = static_cast<float>(x[e]); });
    const Factors factors = factors_to(weight_norm, x);
    constexpr double kLargest = 3e38;  // times a zero x it is to be zero
    const MapSums sums = map_.evaluate(target_, static_cast<float>(fmin(factors.q, kLargest)),
                                       static_cast<float>(fmin(factors.k, kLargest)), gradient != nullptr);
    const double tokens = shape_.n, rows = fmax(sums.targets, 1.0);
    metrics.mse = sums.squares / (tokens * tokens);
    metrics.peak = sums.peak / rows;
    metrics.hit_rate = sums.hits / rows;
    ++evaluations;
    if (gradient != nullptr) {
      // Chain rule through w x/|x|: drop the radial part, then scale by w/|x|.
      const double outer = 2.0 * shape_.scale / (tokens * tokens), radial = sums.radial / (weight_norm * weight_norm);
      for_slice([&](int e) {
        const double factor = e < split_ ? factors.q : factors.k;
        gradient[e] = outer * factor * (map_.gradient(e) - radial * factor * x[e]);
      });
    }
    return metrics.mse;
  }

  __device__ void write_diagnostics(double mse, double peak, double hit_rate, double norm, double iterations,
                                    double evaluations) const {
    if (group_.rank != 0 || threadIdx.x != 0) return;
    const double values[kDiagnostics] = {mse, peak, hit_rate, norm, iterations, evaluations};
    for (int i = 0; i < kDiagnostics; ++i) args_.diagnostics[problem_ * kDiagnostics + i] = values[i];
  }

  const QKSolverArgs& args_;
  const MapShape shape_;
  CtaGroup& group_;
  MapObjective& map_;
  const int size_, split_;  // of [wq | wk], and where wk begins
  int begin_, end_;         // this CTA's slice
  int problem_ = 0;
  const int64_t* target_ = nullptr;
  double *point_, *next_, *gradient_, *next_gradient_, *step_, *kept_;
  float* pairs_;
};

__global__ void __launch_bounds__(kThreads, 1) qk_solver_kernel(const __grid_constant__ QKSolverArgs args) {
  __shared__ CtaGroup::Shared shared;
  __shared__ LbfgsMemory memory;
  extern __shared__ float4 dynamic_shared[];
  const int ctas = args.plan.ctas, index = blockIdx.x / ctas;
  CtaGroup group(ctas, blockIdx.x % ctas, args.counters + index,
                 args.exchange + static_cast<size_t>(index) * CtaGroup::kExchange, shared);
  float* tiles = args.plan.shared_bytes > 0 ? reinterpret_cast<float*>(dynamic_shared)
                                            : args.tiles + blockIdx.x * args.shape.tile_floats();
  MapObjective map(args.shape, args.xq_t, args.xk_t, group, args.maps + index * args.shape.workspace_floats(ctas),
                   tiles);
  DeviceProblem space(args, index, group, map);
  for (int problem = index; problem < args.problems; problem += args.plan.groups) {
    space.take_problem(problem);
    if (!targets_fit(args.targets + static_cast<size_t>(problem) * args.shape.n, args.shape.n)) {
      space.write_nan();
      continue;
    }
    QKSolverOptions options = args.options;
    if (args.weight_norm != nullptr) options.weight_norm = args.weight_norm[problem];
    space.write(search(space, memory, options));
  }
}

// Sets args.plan; the workspace follows from it.
inline cudaError_t plan_qk_solver(QKSolverArgs& args) {
  return plan_groups(qk_solver_kernel, args.problems, args.shape.tiles(), args.shape.tile_floats() * sizeof(float),
                     args.plan);
}

inline cudaError_t launch_qk_solver(const QKSolverArgs& args, cudaStream_t stream) {
  const int n = args.shape.n, dq = args.shape.dq, dk = args.shape.dk;
  const PrepareArgs<double, 2> prepare{
      args.counters, args.plan.groups, {{args.xq, args.xq_t, dq, n, 1, dq}, {args.xk, args.xk_t, dk, n, 1, dk}}};
  const cudaError_t error = launch(prepare_kernel<double, 2>, 64, 0, stream, false, prepare);
  if (error != cudaSuccess) return error;
  return launch(qk_solver_kernel, args.plan.blocks(), args.plan.shared_bytes, stream, true, args);
}

}  // namespace convinit
