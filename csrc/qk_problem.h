// One problem of the Q/K fit on the CPU, solved by one thread.
#pragma once

#include <cstdint>
#include <vector>

#include "qk_objective.h"
#include "qk_search.h"

namespace convinit {

struct QKSolution {
  std::vector<double> wq;    // [dq, rank], Frobenius norm = weight_norm
  std::vector<double> wk_t;  // [rank, dk], likewise
  double weight_norm = 0;
  QKMetrics metrics;
  int64_t iterations = 0;
  int64_t evaluations = 0;  // of the loss, with or without its gradient
};

// A start is a pair of factors of any norm; only their directions count.
struct QKStart {
  const double* wq;  // [dq, rank]
  const double* wk;  // [dk, rank]
};

// options.num_starts is starts.size().
QKSolution solve_qk(const QKBasis& basis, const int64_t* target, const std::vector<QKStart>& starts,
                    const QKSolverOptions& options);

}  // namespace convinit
