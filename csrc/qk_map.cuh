// The papers' loss and its gradient by a group of CTAs, for one problem:
//
//   Q = Xq Wq,  K = Xk Wk                   [N, rank]
//   A = softmax(scale * Q K^T)              [N, N], never in global memory
//   loss = mean((A - M)^2)                  M has a 1 at target[n] in row n, or none where target[n] is -1
//
// Each CTA owns every size-th tile of kTile tokens. It makes K for its tokens; makes its rows of A from Q of its tokens
// and all of K, turns them in place into dA = d loss / d logits, and has dQ for its tokens and a share of dK; adds up dK
// for its tokens; and is left with its share of dWq = Xq^T dQ and of dWk = Xk^T dK. Arithmetic is in float32, sums over
// warps, tiles and CTAs of what is judged (loss, peak) in float64.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cta_group.cuh"

namespace convinit {

constexpr int kTile = 16;
// Tiles lie token-last in shared memory, [*][kStride]: 16-byte reads of 4 tokens each, free of bank conflicts.
constexpr int kStride = kTile + 4;

inline __host__ __device__ int padded(int n) { return (n + kTile - 1) / kTile * kTile; }

struct MapShape {
  int n, dq, dk, rank;
  float scale;

  __host__ __device__ int ld() const { return padded(n); }
  __host__ __device__ int tiles() const { return padded(n) / kTile; }
  __host__ __device__ int size() const { return (dq + dk) * rank; }  // numbers in [wq | wk]
  // Floats of a CTA's tiles: rows of the map, and two of Q, dQ or dK.
  __host__ __device__ size_t tile_floats() const { return static_cast<size_t>(n + 2 * rank) * kStride; }
  // Floats of a group's workspace.
  __host__ __device__ size_t workspace_floats(int ctas) const {
    return size() + 2 * static_cast<size_t>(rank) * ld() +
           static_cast<size_t>(ctas) * (static_cast<size_t>(rank) * ld() + size());
  }
};

struct MapSums {
  double squares;        // sum of (A - M)^2
  double peak;           // sum of A at the targets
  double hits, targets;  // rows in which the target alone is largest; rows that have a target
  double radial;         // <dA, logits / scale> = <dWq, Wq> = <dWk, Wk>
};

// Whether all targets lie in [-1, n). Every CTA of a group looks, so that all agree.
__device__ inline bool targets_fit(const int64_t* target, int n) {
  bool fit = true;
  for (int i = threadIdx.x; i < n; i += kThreads) fit &= target[i] >= -1 && target[i] < n;
  return __syncthreads_and(fit);
}

// The kernel waits for memory more than it computes: a CTA has 8 warps, and what other CTAs wrote comes from the L2 cache.
// So each thread has kFlight loads on their way at once, also where fewer are left.

// c[i][j] = sum over p of a[p][i] b[p][j], for kTile rows i: a [depth][lda], b [depth][ldb]. `store(i, j, c)` takes
// kRows rows at once.
template <int kRows, class Store>
__device__ inline void multiply(const float* a, int lda, const float* b, int ldb, int depth, int columns, Store store) {
  constexpr int kFlight = kRows > 4 ? 8 : 16;
  for (int item = threadIdx.x; item < kTile / kRows * columns; item += kThreads) {
    const int i = item / columns * kRows, j = item % columns;
    float c[kRows] = {};
    for (int first = 0; first < depth; first += kFlight) {
      float bj[kFlight];
#pragma unroll
      for (int p = 0; p < kFlight; ++p) bj[p] = first + p < depth ? b[(first + p) * ldb + j] : 0.0f;
#pragma unroll
      for (int p = 0; p < kFlight; ++p) {
        const float* ap = a + min(first + p, depth - 1) * lda + i;
#pragma unroll
        for (int r = 0; r < kRows; r += 4) {
          const float4 ai = *reinterpret_cast<const float4*>(ap + r);
          c[r] += ai.x * bj[p];
          c[r + 1] += ai.y * bj[p];
          c[r + 2] += ai.z * bj[p];
          c[r + 3] += ai.w * bj[p];
        }
      }
    }
    store(i, j, c);
  }
}

// The sum of x[0], x[stride], ..., x[(count - 1) * stride], in this order.
template <class Sum>
__device__ inline Sum strided_sum(const float* x, size_t stride, int count) {
  constexpr int kFlight = 16;
  Sum sum = 0;
  for (int first = 0; first < count; first += kFlight) {
    float parts[kFlight];
#pragma unroll
    for (int r = 0; r < kFlight; ++r) parts[r] = first + r < count ? x[(first + r) * stride] : 0.0f;
#pragma unroll
    for (int r = 0; r < kFlight; ++r) sum += parts[r];
  }
  return sum;
}

// c[i][j] (+)= sum over the kTile tokens t of a[i][t] b[j][t]: a [rows][lda], b [columns][kStride], c [rows][ldc].
// A thread makes kRows entries of one column.
template <int kRows>
__device__ inline void multiply_tokens(const float* a, int lda, int rows, const float* b, int columns, float* c,
                                       int ldc, bool accumulate) {
  for (int item = threadIdx.x; item < (rows + kRows - 1) / kRows * columns; item += kThreads) {
    const int begin = item / columns * kRows, j = item % columns;
    float4 bj[kTile / 4];
#pragma unroll
    for (int t = 0; t < kTile / 4; ++t) bj[t] = *reinterpret_cast<const float4*>(b + j * kStride + 4 * t);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = begin + r;
      if (i >= rows) break;
      float sum = accumulate ? c[i * ldc + j] : 0.0f;
#pragma unroll
      for (int t = 0; t < kTile / 4; ++t) {
        const float4 ai = *reinterpret_cast<const float4*>(a + i * lda + 4 * t);
        sum += ai.x * bj[t].x + ai.y * bj[t].y + ai.z * bj[t].z + ai.w * bj[t].w;
      }
      c[i * ldc + j] = sum;
    }
  }
}

class MapObjective {
 public:
  // xq_t [dq, ld], xk_t [dk, ld]: the tokens, last and padded with zeros. `tiles` may be shared or global memory.
  __device__ MapObjective(const MapShape& shape, const float* xq_t, const float* xk_t, CtaGroup& group,
                          float* workspace, float* tiles)
      : weights(workspace), shape_(shape), xq_t_(xq_t), xk_t_(xk_t), group_(group), k_(weights + shape.size()),
        k_t_(k_ + static_cast<size_t>(shape.rank) * shape.ld()),
        grad_k_t_(k_t_ + static_cast<size_t>(shape.rank) * shape.ld()),
        grad_(grad_k_t_ + static_cast<size_t>(group.size) * shape.rank * shape.ld()), map_(tiles),
        q_tile_(tiles + static_cast<size_t>(shape.n) * kStride), d_tile_(q_tile_ + shape.rank * kStride) {}

  float* const weights;  // [wq | wk], each [dq or dk, rank]

  // The loss at factor_q wq, factor_k wk. All CTAs must have written their share of `weights` and met at a barrier since.
  __device__ __noinline__ MapSums evaluate(const int64_t* target, float factor_q, float factor_k, bool with_gradient) {
    make_keys(factor_k);
    group_.sync();
    make_map(target, factor_q, with_gradient);
    const double* total = group_.sums(5);
    const MapSums sums{total[0], total[1], total[2], total[3], total[4]};
    if (with_gradient) {
      finish_keys();
      group_.sync();
    }
    return sums;
  }

  // Entry e of d(sum of squares) / 2 scale, by [wq | wk] as they were scaled.
  __device__ double gradient(int e) const { return strided_sum<double>(grad_ + e, shape_.size(), group_.size); }

 private:
  __device__ void make_keys(float factor) {
    const int rank = shape_.rank, ld = shape_.ld();
    const float* wk = weights + shape_.dq * rank;
    for (int tile = group_.rank; tile < shape_.tiles(); tile += group_.size) {
      const int first = tile * kTile;
      multiply<4>(xk_t_ + first, ld, wk, rank, shape_.dk, rank, [&](int i, int j, const float (&c)[4]) {
        for (int r = 0; r < 4; ++r) {
          k_[(first + i + r) * rank + j] = factor * c[r];
          k_t_[j * ld + first + i + r] = factor * c[r];
        }
      });
    }
  }

  __device__ void make_map(const int64_t* target, float factor, bool with_gradient) {
    const int n = shape_.n, rank = shape_.rank, ld = shape_.ld();
    float* grad_k_t = grad_k_t_ + static_cast<size_t>(group_.rank) * rank * ld;
    float* grad_wq = grad_ + static_cast<size_t>(group_.rank) * shape_.size();
    MapSums sums{};  // of this warp's rows; radial: of this thread
    for (int tile = group_.rank; tile < shape_.tiles(); tile += group_.size) {
      const int first = tile * kTile;
      const bool accumulate = tile != group_.rank;
      multiply<4>(xq_t_ + first, ld, weights, rank, shape_.dq, rank, [&](int i, int j, const float (&c)[4]) {
        store4(q_tile_ + j * kStride + i, factor * c[0], factor * c[1], factor * c[2], factor * c[3]);
      });
      __syncthreads();
      multiply<kTile>(q_tile_, kStride, k_t_, ld, rank, n, [&](int, int j, const float (&c)[kTile]) {
        for (int r = 0; r < kTile; r += 4) store4(map_ + j * kStride + r, c[r], c[r + 1], c[r + 2], c[r + 3]);
      });
      __syncthreads();
      for (int row = 2 * warp(); row < kTile; row += 2 * kWarps) two_rows(row, first, target, with_gradient, sums);
      __syncthreads();
      if (!with_gradient) continue;
      multiply<4>(map_, kStride, k_, rank, n, rank, [&](int i, int j, const float (&c)[4]) {
        store4(d_tile_ + j * kStride + i, c[0], c[1], c[2], c[3]);
        for (int r = 0; r < 4; ++r) sums.radial += static_cast<double>(c[r]) * q_tile_[j * kStride + i + r];
      });
      multiply_tokens<8>(q_tile_, kStride, rank, map_, n, grad_k_t, ld, accumulate);
      __syncthreads();
      multiply_tokens<2>(xq_t_ + first, ld, shape_.dq, d_tile_, rank, grad_wq, rank, accumulate);
    }
    const double by_warp[] = {sums.squares, sums.peak, sums.hits, sums.targets};
    for (int i = 0; i < 4; ++i) group_.add(i, lane() == 0 ? by_warp[i] : 0.0);
    group_.add(4, sums.radial);
  }

  // Rows `row` and `row` + 1 of the tile, by one warp: logits / scale become attention, and then d (sum of squares) / 2
  // by the scaled logits. Each lane keeps to its own columns.
  __device__ void two_rows(int row, int first, const int64_t* target, bool with_gradient, MapSums& sums) {
    const int n = shape_.n;
    int aim[2];
    float top[2], total[2] = {}, tied[2] = {}, hit[2] = {}, peak[2] = {}, squares[2] = {}, inner[2] = {};
    for (int r = 0; r < 2; ++r) {
      aim[r] = first + row + r < n ? static_cast<int>(target[first + row + r]) : -1;
      top[r] = -INFINITY;
    }
    for (int j = lane(); j < n; j += 32)
      for (int r = 0; r < 2; ++r) top[r] = fmaxf(top[r], map_[j * kStride + row + r]);
    for (int r = 0; r < 2; ++r) top[r] = warp_max(top[r]);
    for (int j = lane(); j < n; j += 32)
      for (int r = 0; r < 2; ++r) {
        float& entry = map_[j * kStride + row + r];
        if (entry == top[r]) {
          tied[r] += 1;
          if (j == aim[r]) hit[r] = 1;
        }
        entry = expf((entry - top[r]) * shape_.scale);
        total[r] += entry;
      }
    for (int r = 0; r < 2; ++r) total[r] = 1.0f / warp_sum(total[r]);
    for (int j = lane(); j < n; j += 32)
      for (int r = 0; r < 2; ++r) {
        const float a = map_[j * kStride + row + r] * total[r], d = a - (j == aim[r] ? 1.0f : 0.0f);
        if (j == aim[r]) peak[r] = a;
        squares[r] += d * d;
        inner[r] += d * a;
      }
    for (int r = 0; r < 2; ++r) inner[r] = warp_sum(inner[r]);  // <A, A - M>: the softmax Jacobian's projection
    if (with_gradient)
      for (int j = lane(); j < n; j += 32)
        for (int r = 0; r < 2; ++r) {
          float& entry = map_[j * kStride + row + r];
          const float a = entry * total[r], d = a - (j == aim[r] ? 1.0f : 0.0f);
          entry = first + row + r < n ? a * (d - inner[r]) : 0.0f;
        }
    for (int r = 0; r < 2; ++r) {
      if (first + row + r >= n) break;
      sums.squares += warp_sum(squares[r]);
      if (aim[r] < 0) continue;
      sums.targets += 1;
      sums.peak += warp_sum(peak[r]);
      const float ties = warp_sum(tied[r]);
      sums.hits += warp_sum(hit[r]) == 1 && ties == 1 ? 1 : 0;
    }
  }

  __device__ void finish_keys() {
    const int n = shape_.n, rank = shape_.rank, ld = shape_.ld();
    float* grad_wk = grad_ + static_cast<size_t>(group_.rank) * shape_.size() + shape_.dq * rank;
    for (int tile = group_.rank; tile < shape_.tiles(); tile += group_.size) {
      const int first = tile * kTile;
      __syncthreads();  // the tile before is done with d_tile
      for (int item = threadIdx.x; item < kTile * rank; item += kThreads) {
        const int i = item % kTile, j = item / kTile;
        const float* shares = grad_k_t_ + j * ld + first + i;
        d_tile_[j * kStride + i] =
            first + i < n ? strided_sum<float>(shares, static_cast<size_t>(rank) * ld, group_.size) : 0.0f;
      }
      __syncthreads();
      multiply_tokens<2>(xk_t_ + first, ld, shape_.dk, d_tile_, rank, grad_wk, rank, tile != group_.rank);
    }
  }

  __device__ static void store4(float* to, float a, float b, float c, float d) {
    *reinterpret_cast<float4*>(to) = make_float4(a, b, c, d);
  }

  const MapShape shape_;
  const float *xq_t_, *xk_t_;
  CtaGroup& group_;
  float *k_, *k_t_;          // [N, rank], [rank, ld]
  float *grad_k_t_, *grad_;  // shares: [ctas, rank, ld], [ctas, size]
  float *map_, *q_tile_, *d_tile_;
};

// Prepares a launch: counters to zero, and copies of matrices with rows padded with zeros to a multiple of kTile.
template <class T>
struct PaddedCopy {
  const T* from;  // entry (i, j) at i * row_stride + j * column_stride
  float* to;      // [rows, padded(columns)]
  int rows, columns, row_stride, column_stride;
};

template <class T, int kCopies>
struct PrepareArgs {
  unsigned* counters;
  int groups;
  PaddedCopy<T> copies[kCopies];
};

template <class T, int kCopies>
__global__ void prepare_kernel(PrepareArgs<T, kCopies> args) {
  const int start = blockIdx.x * kThreads + threadIdx.x, step = gridDim.x * kThreads;
  for (int i = start; i < args.groups; i += step) args.counters[i] = 0;
  for (const PaddedCopy<T>& copy : args.copies) {
    const int ld = padded(copy.columns);
    for (int item = start; item < copy.rows * ld; item += step) {
      const int i = item / ld, j = item % ld;
      copy.to[item] =
          j < copy.columns ? static_cast<float>(copy.from[i * copy.row_stride + j * copy.column_stride]) : 0.0f;
    }
  }
}

}  // namespace convinit
