// The papers' loss and its gradient, in single precision, for one problem of the Q/K fit:
//
//   A    = softmax(scale * (Xq Wq) (Xk Wk)^T)            [N, N]
//   loss = mean((A - M)^2)
//
// M has at most a single 1 in each row, so it is given as `target` [N]: the column of the 1, or -1 for a zero row.
// The N x N map is never stored: rows are made, used and forgotten `kRowBlock` at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "qk_search.h"

namespace convinit {

// How another thread ends a fit and sees how far it is: int64 [3], stop unless 0, problems solved, evaluations made.
class QKMonitor {
 public:
  struct Stopped {};

  explicit QKMonitor(int64_t* numbers = nullptr) : numbers_(numbers) {}
  void stop_if_told() const {
    if (numbers_ != nullptr && __atomic_load_n(numbers_, __ATOMIC_RELAXED) != 0) throw Stopped{};
  }
  void count_problem() const { count(1); }
  void count_evaluation() const { count(2); }

 private:
  void count(int of) const {
    if (numbers_ != nullptr) __atomic_fetch_add(numbers_ + of, 1, __ATOMIC_RELAXED);
  }

  int64_t* numbers_;
};

// What all problems of one call share. Matrices are row-major; leading dimensions are padded with zeros to a multiple
// of `kPad` floats, so that vector loops have no tails.
struct QKBasis {
  static constexpr int64_t kPad = 16;
  static int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

  QKBasis(const double* xq, int64_t dq, const double* xk, int64_t dk, int64_t n, int64_t rank, double scale,
          QKMonitor monitor = QKMonitor());

  int64_t n, dq, dk, rank;              // tokens, basis sizes of the query and key side, columns of Wq and Wk
  int64_t ld_n, ld_dq, ld_dk, ld_rank;  // their padded sizes
  float scale;
  QKMonitor monitor;
  std::vector<float> xq;    // [N, ld_dq]
  std::vector<float> xk;    // [N, ld_dk]
  std::vector<float> xk_t;  // [dk, ld_n]
};

// Evaluates one problem; throws QKMonitor::Stopped when told to. Not thread-safe: one object a thread.
class QKObjective {
 public:
  QKObjective(const QKBasis& basis, const int64_t* target);

  // wq [dq, rank] and wk_t [rank, dk], dense. Gradients, of the same shapes, are written unless null.
  QKMetrics operator()(const double* wq, const double* wk_t, double* grad_wq, double* grad_wk_t);

  struct Workspace {
    std::vector<float> wq, wk_t, q, k, k_t, dq, dk_t, grad_q, grad_k_t, map, diff;
  };

 private:
  const QKBasis& basis_;
  const int64_t* target_;
  Workspace ws_;
};

}  // namespace convinit
