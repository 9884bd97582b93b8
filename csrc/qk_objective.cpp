#include "qk_objective.h"

#include <algorithm>
#include <limits>

#include "cpu.h"
#include "simd.h"

namespace convinit {
namespace {

constexpr int64_t kRowBlock = 24;  // a multiple of the 6 rows of a register tile; 24 x 1,024 floats fit the L2 cache

struct Sums {
  double squared_error = 0;
  double peak = 0;
  int64_t hits = 0;
  int64_t rows_with_target = 0;
};

// One row: logits in `map` become attention; `map` is then turned into d loss / d logits, short of the factor 2/N^2.
template <int W>
CONVINIT_INLINE void softmax_loss_row(float* map, float* diff, int64_t n, int64_t ld, float scale, int64_t target,
                                      bool with_grad, Sums& sums) {
  using V = simd::F<W>;
  for (int64_t j = n; j < ld; ++j) map[j] = -std::numeric_limits<float>::infinity();
  V top = simd::load<W>(map);
  for (int64_t j = W; j < ld; j += W) top = simd::max<W>(top, simd::load<W>(map + j));
  const float row_max = simd::max_element<W>(top);
  if (target >= 0 && map[target] == row_max) {
    int64_t tied = 0;
    for (int64_t j = 0; j < n; ++j) tied += map[j] == row_max;
    sums.hits += tied == 1;
  }

  V total{};
  for (int64_t j = 0; j < ld; j += W) {
    const V e = simd::exp_nonpositive<W>((simd::load<W>(map + j) - row_max) * scale);
    simd::store<W>(map + j, e);
    total += e;
  }
  const float inverse = 1.0f / simd::sum<W>(total);
  for (int64_t j = 0; j < ld; j += W) {
    const V a = simd::load<W>(map + j) * inverse;
    simd::store<W>(map + j, a);
    simd::store<W>(diff + j, a);
  }
  if (target >= 0) {
    sums.peak += map[target];
    sums.rows_with_target += 1;
    diff[target] -= 1.0f;
  }

  V squares{}, inner{};
  for (int64_t j = 0; j < ld; j += W) {
    const V d = simd::load<W>(diff + j);
    squares += d * d;
    inner += d * simd::load<W>(map + j);
  }
  sums.squared_error += simd::sum<W>(squares);
  if (!with_grad) return;
  const float mean = simd::sum<W>(inner);  // <A, A - M>: the softmax Jacobian's projection
  for (int64_t j = 0; j < ld; j += W)
    simd::store<W>(map + j, simd::load<W>(map + j) * (simd::load<W>(diff + j) - mean));
}

template <int W>
CONVINIT_INLINE Sums evaluate(const QKBasis& b, const int64_t* target, QKObjective::Workspace& ws, bool with_grad) {
  // Q = Xq Wq [N, rank];  K^T = Wk^T Xk^T [rank, N]
  simd::gemm<W>(b.n, b.ld_rank, b.dq, b.xq.data(), b.ld_dq, 1, ws.wq.data(), b.ld_rank, ws.q.data(), b.ld_rank);
  simd::gemm<W>(b.rank, b.ld_n, b.dk, ws.wk_t.data(), b.ld_dk, 1, b.xk_t.data(), b.ld_n, ws.k_t.data(), b.ld_n);
  for (int64_t j = 0; j < b.n; ++j)
    for (int64_t c = 0; c < b.rank; ++c) ws.k[j * b.ld_rank + c] = ws.k_t[c * b.ld_n + j];

  Sums sums;
  for (int64_t i0 = 0; i0 < b.n; i0 += kRowBlock) {
    b.monitor.stop_if_told();
    const int64_t rows = i0 + kRowBlock <= b.n ? kRowBlock : b.n - i0;
    const float* q = ws.q.data() + i0 * b.ld_rank;
    float* map = ws.map.data();
    simd::gemm<W>(rows, b.ld_n, b.rank, q, b.ld_rank, 1, ws.k_t.data(), b.ld_n, map, b.ld_n);
    for (int64_t i = 0; i < rows; ++i)
      softmax_loss_row<W>(map + i * b.ld_n, ws.diff.data(), b.n, b.ld_n, b.scale, target[i0 + i], with_grad, sums);
    if (!with_grad) continue;
    // dQ = dL K [rows, rank];  dK^T += Q^T dL [rank, N]
    simd::gemm<W>(rows, b.ld_rank, b.n, map, b.ld_n, 1, ws.k.data(), b.ld_rank, ws.dq.data() + i0 * b.ld_rank,
                  b.ld_rank);
    simd::gemm<W>(b.rank, b.ld_n, rows, q, 1, b.ld_rank, map, b.ld_n, ws.dk_t.data(), b.ld_n, i0 > 0);
  }
  if (with_grad) {
    simd::gemm<W>(b.dq, b.ld_rank, b.n, b.xq.data(), 1, b.ld_dq, ws.dq.data(), b.ld_rank, ws.grad_q.data(), b.ld_rank);
    simd::gemm<W>(b.rank, b.ld_dk, b.n, ws.dk_t.data(), b.ld_n, 1, b.xk.data(), b.ld_dk, ws.grad_k_t.data(), b.ld_dk);
  }
  return sums;
}

using Evaluate = Sums (*)(const QKBasis&, const int64_t*, QKObjective::Workspace&, bool);

Sums evaluate_baseline(const QKBasis& b, const int64_t* t, QKObjective::Workspace& ws, bool g) {
  return evaluate<4>(b, t, ws, g);
}
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) Sums evaluate_avx2(const QKBasis& b, const int64_t* t, QKObjective::Workspace& ws,
                                                       bool g) {
  return evaluate<8>(b, t, ws, g);
}
__attribute__((target("avx512f"))) Sums evaluate_avx512(const QKBasis& b, const int64_t* t, QKObjective::Workspace& ws,
                                                        bool g) {
  return evaluate<16>(b, t, ws, g);
}
#endif

Evaluate best_evaluate() {
#if defined(__x86_64__)
  if (vector_width() == 16) return evaluate_avx512;
  if (vector_width() == 8) return evaluate_avx2;
#endif
  return evaluate_baseline;
}

void copy_padded(const double* from, int64_t rows, int64_t cols, std::vector<float>& to, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) to[i * ld + j] = static_cast<float>(from[i * cols + j]);
}

void copy_dense(const std::vector<float>& from, int64_t ld, double factor, int64_t rows, int64_t cols, double* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) to[i * cols + j] = factor * from[i * ld + j];
}

}  // namespace

QKBasis::QKBasis(const double* xq_, int64_t dq_, const double* xk_, int64_t dk_, int64_t n_, int64_t rank_,
                 double scale_, QKMonitor monitor_)
    : n(n_), dq(dq_), dk(dk_), rank(rank_), ld_n(padded(n)), ld_dq(padded(dq)), ld_dk(padded(dk)),
      ld_rank(padded(rank)), scale(static_cast<float>(scale_)), monitor(monitor_), xq(n * ld_dq), xk(n * ld_dk),
      xk_t(dk * ld_n) {
  copy_padded(xq_, n, dq, xq, ld_dq);
  copy_padded(xk_, n, dk, xk, ld_dk);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < dk; ++j) xk_t[j * ld_n + i] = static_cast<float>(xk_[i * dk + j]);
}

QKObjective::QKObjective(const QKBasis& b, const int64_t* target) : basis_(b), target_(target) {
  ws_.wq.resize(b.dq * b.ld_rank);
  ws_.wk_t.resize(b.rank * b.ld_dk);
  ws_.q.resize(b.n * b.ld_rank);
  ws_.k.resize(b.n * b.ld_rank);
  ws_.k_t.resize(b.rank * b.ld_n);
  ws_.dq.resize(b.n * b.ld_rank);
  ws_.dk_t.resize(b.rank * b.ld_n);
  ws_.grad_q.resize(b.dq * b.ld_rank);
  ws_.grad_k_t.resize(b.rank * b.ld_dk);
  ws_.map.resize(kRowBlock * b.ld_n);
  ws_.diff.resize(b.ld_n);
}

QKMetrics QKObjective::operator()(const double* wq, const double* wk_t, double* grad_wq, double* grad_wk_t) {
  static const Evaluate evaluate_here = best_evaluate();
  const QKBasis& b = basis_;
  copy_padded(wq, b.dq, b.rank, ws_.wq, b.ld_rank);
  copy_padded(wk_t, b.rank, b.dk, ws_.wk_t, b.ld_dk);
  const Sums sums = evaluate_here(b, target_, ws_, grad_wq != nullptr);
  b.monitor.count_evaluation();
  const double per_entry = 1.0 / (static_cast<double>(b.n) * static_cast<double>(b.n));
  if (grad_wq != nullptr) {
    const double factor = 2.0 * per_entry * b.scale;
    copy_dense(ws_.grad_q, b.ld_rank, factor, b.dq, b.rank, grad_wq);
    copy_dense(ws_.grad_k_t, b.ld_dk, factor, b.rank, b.dk, grad_wk_t);
  }
  const double rows = static_cast<double>(std::max<int64_t>(sums.rows_with_target, 1));
  return {sums.squared_error * per_entry, sums.peak / rows, static_cast<double>(sums.hits) / rows};
}

}  // namespace convinit
