// One problem of the Q/K fit: the best attention map at a given weight norm, or at the norm that gives a wanted peak.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "qk_objective.h"

namespace convinit {

struct QKSolverOptions {
  int64_t max_iterations = 200;
  double tolerance = 1e-2;        // see LbfgsOptions
};

struct QKSolution {
  std::vector<double> wq;         // [dq, rank], Frobenius norm = weight_norm
  std::vector<double> wk_t;       // [rank, dk], likewise
  double weight_norm = 0;
  QKMetrics metrics;
  int64_t iterations = 0;
  int64_t evaluations = 0;        // of the loss, with or without its gradient
};

// A start is a pair of factors of any norm; only their directions count.
struct QKStart {
  const double* wq;               // [dq, rank]
  const double* wk;               // [dk, rank]
};

// Exactly one of weight_norm and peak must be given. If the peak cannot be reached, the highest one found is returned.
QKSolution solve_qk(const QKBasis& basis, const int64_t* target, const std::vector<QKStart>& starts,
                    std::optional<double> weight_norm, std::optional<double> peak, const QKSolverOptions& options);

}  // namespace convinit
