// Steps of the papers' fit on CUDA: Adam on mean((softmax(scale * P Wq (P Wk)^T) - M)^2), each head by a group of CTAs,
// any number of steps in one launch.
//
// P = X V^T in a basis of its row space: the weights [D, rank] meet the tokens as V^T W [r, rank], and their gradient is
// V times that of V^T W. Sin-cos embeddings of 512 dimensions have r = 31 or so. Each CTA keeps rows of Wq, Wk and of
// Adam's moments. A step costs six barriers: shares of V^T W, V^T W, keys, map, shares of the gradient, gradient.
#pragma once

#include "qk_map.cuh"

namespace convinit {

struct QKAdamArgs {
  MapShape shape;                     // dq = dk = size of the basis
  GroupPlan plan;
  int problems, dim;                  // heads, D
  int64_t first_step, steps;          // first_step steps were made before
  double lr, beta1, beta2, eps;
  double heads;                       // the loss is a mean over so many
  const float *tokens, *directions;   // X [n, r], V [D, r]
  const int64_t* targets;             // [problems, n]
  float *wq, *wk;                     // [problems, D, rank], updated
  float* moments;                     // [2 (first, second), 2 (wq, wk), problems, D, rank], updated
  float* loss;                        // [problems]: the mse before the last step

  unsigned* counters;                 // workspace: [groups]
  double* exchange;                   // [groups, CtaGroup::kExchange]
  float *x_t, *v, *v_t;               // [r, padded(n)], [D, padded(r)], [r, padded(D)]
  float* shares;                      // [groups, ctas, 2, r, rank]: of V^T W
  float* gradient;                    // [groups, 2, r, rank]
  float* maps;                        // [groups, shape.workspace_floats]
  float* tiles;                       // [groups, ctas, tile_floats], where they do not fit shared memory

  void carve(Carver& carver) {
    const size_t groups = plan.groups, basis = shape.dq, size = shape.size();
    counters = carver.take<unsigned>(groups);
    exchange = carver.take<double>(groups * CtaGroup::kExchange);
    x_t = carver.take<float>(basis * shape.ld());
    v = carver.take<float>(static_cast<size_t>(dim) * padded(shape.dq));
    v_t = carver.take<float>(basis * padded(dim));
    shares = carver.take<float>(groups * plan.ctas * size);
    gradient = carver.take<float>(groups * size);
    maps = carver.take<float>(groups * shape.workspace_floats(plan.ctas));
    tiles = carver.take<float>(static_cast<size_t>(plan.blocks()) * plan.tile_bytes / sizeof(float));
  }
};

__global__ void __launch_bounds__(kThreads, 1) qk_adam_kernel(const __grid_constant__ QKAdamArgs args) {
  __shared__ CtaGroup::Shared shared;
  extern __shared__ float4 dynamic_shared[];
  const MapShape& shape = args.shape;
  const int ctas = args.plan.ctas, index = blockIdx.x / ctas;
  const int rank = shape.rank, basis = shape.dq, half = basis * rank, size = 2 * half;
  CtaGroup group(ctas, blockIdx.x % ctas, args.counters + index,
                 args.exchange + static_cast<size_t>(index) * CtaGroup::kExchange, shared);
  float* tiles = args.plan.shared_bytes > 0 ? reinterpret_cast<float*>(dynamic_shared)
                                            : args.tiles + blockIdx.x * shape.tile_floats();
  MapObjective map(shape, args.x_t, args.x_t, group, args.maps + index * shape.workspace_floats(ctas), tiles);
  float* shares = args.shares + static_cast<size_t>(index) * ctas * size;
  float* gradient = args.gradient + static_cast<size_t>(index) * size;

  // This CTA's rows of the weights, and its part of what is [2, basis, rank].
  const int rows = padded((args.dim + ctas - 1) / ctas), begin = min(group.rank * rows, args.dim);
  const int end = min(begin + rows, args.dim);
  const int part = (size + ctas - 1) / ctas, part_end = min((group.rank + 1) * part, size);
  const double outer = 2.0 * shape.scale / (args.heads * shape.n * shape.n);

  for (int problem = index; problem < args.problems; problem += args.plan.groups) {
    const int64_t* target = args.targets + static_cast<size_t>(problem) * shape.n;
    const size_t head = static_cast<size_t>(args.dim) * rank, all = head * args.problems;
    if (!targets_fit(target, shape.n)) {  // no figure that could be taken for a result
      for (int e = begin * rank + threadIdx.x; e < end * rank; e += kThreads)
        args.wq[problem * head + e] = args.wk[problem * head + e] = NAN;
      if (group.rank == 0 && threadIdx.x == 0) args.loss[problem] = NAN;
      continue;
    }
    double power1 = pow(args.beta1, static_cast<double>(args.first_step));
    double power2 = pow(args.beta2, static_cast<double>(args.first_step));
    double squares = 0;
    for (int64_t step = 0; step < args.steps; ++step) {
      __syncthreads();  // the step before has updated all rows
      for (int side = 0; side < 2; ++side) {
        const float* w = (side == 0 ? args.wq : args.wk) + problem * head + static_cast<size_t>(begin) * rank;
        float* share = shares + static_cast<size_t>(group.rank) * size + side * half;
        for (int first = 0; first < basis; first += kTile)
          multiply<4>(args.v + begin * padded(basis) + first, padded(basis), w, rank, end - begin, rank,
                      [&](int i, int j, const float(&c)[4]) {
                        for (int r = 0; r < 4 && first + i + r < basis; ++r) share[(first + i + r) * rank + j] = c[r];
                      });
      }
      group.sync();
      for (int e = group.rank * part + threadIdx.x; e < part_end; e += kThreads)
        map.weights[e] = strided_sum<float>(shares + e, size, ctas);
      group.sync();
      squares = map.evaluate(target, 1.0f, 1.0f, true).squares;
      for (int e = group.rank * part + threadIdx.x; e < part_end; e += kThreads)
        gradient[e] = static_cast<float>(outer * map.gradient(e));
      group.sync();

      power1 *= args.beta1;
      power2 *= args.beta2;
      const float step_size = static_cast<float>(args.lr / (1 - power1));
      const float correction = static_cast<float>(1 / sqrt(1 - power2)), eps = static_cast<float>(args.eps);
      const float beta1 = static_cast<float>(args.beta1), beta2 = static_cast<float>(args.beta2);
      const float rest1 = static_cast<float>(1 - args.beta1), rest2 = static_cast<float>(1 - args.beta2);
      for (int side = 0; side < 2; ++side) {
        float* w = (side == 0 ? args.wq : args.wk) + problem * head;
        float* m = args.moments + side * all + problem * head;
        float* v = m + 2 * all;
        for (int first = begin; first < end; first += kTile)
          multiply<4>(args.v_t + first, padded(args.dim), gradient + side * half, rank, basis, rank,
                      [&](int i, int j, const float(&c)[4]) {
                        for (int r = 0; r < 4 && first + i + r < end; ++r) {
                          const size_t e = static_cast<size_t>(first + i + r) * rank + j;
                          m[e] = beta1 * m[e] + rest1 * c[r];
                          v[e] = beta2 * v[e] + rest2 * c[r] * c[r];
                          w[e] -= step_size * m[e] / (sqrtf(v[e]) * correction + eps);
                        }
                      });
      }
    }
    if (group.rank == 0 && threadIdx.x == 0)
      args.loss[problem] = static_cast<float>(squares / (static_cast<double>(shape.n) * shape.n));
  }
}

// Sets args.plan; the workspace follows from it.
inline cudaError_t plan_qk_adam(QKAdamArgs& args) {
  return plan_groups(qk_adam_kernel, args.problems, args.shape.tiles(), args.shape.tile_floats() * sizeof(float),
                     args.plan);
}

inline cudaError_t launch_qk_adam(const QKAdamArgs& args, cudaStream_t stream) {
  const int n = args.shape.n, basis = args.shape.dq;
  const PrepareArgs<float, 3> prepare{args.counters,
                                      args.plan.groups,
                                      {{args.tokens, args.x_t, basis, n, 1, basis},
                                       {args.directions, args.v, args.dim, basis, basis, 1},
                                       {args.directions, args.v_t, basis, args.dim, 1, basis}}};
  const cudaError_t error = launch(prepare_kernel<float, 3>, 64, 0, stream, false, prepare);
  if (error != cudaSuccess) return error;
  return launch(qk_adam_kernel, args.plan.blocks(), args.plan.shared_bytes, stream, true, args);
}

}  // namespace convinit
