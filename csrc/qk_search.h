// How one problem of the Q/K fit is solved: the best attention map at a given weight norm, or at the norm that gives a
// wanted peak. One text for CPU and CUDA: a `Space` (see lbfgs.h) holds the point x = (W_q, W_k) and evaluates the loss.
// The loss is taken at w x_q/|x_q|, w x_k/|x_k|: x is free, the weights it stands for keep the norm w each. (For given
// B = W_q W_k^T, equal norms are also the cheapest split.) Beside what `minimise` asks for, the Space has
//
//   double weight_norm;  QKMetrics metrics;    of the latest evaluation
//   void start(int64_t s)                      point = start s, both factors of norm 1
//   double value()                             the loss at the point, without a gradient
//   void normalise()                           both factors of the point to norm 1
//   void keep(), void recall()                 the point to a safe place, and back
//   double natural_norm()                      a weight norm at which logits are about 1 at most: where a map begins to
//                                              differ from a uniform one
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "lbfgs.h"

namespace convinit {

struct QKMetrics {
  double mse = 0;
  double peak = 0;      // mean attention on the target, over the rows that have one
  double hit_rate = 0;  // share of those rows in which the target alone has the largest attention
};

constexpr int kDiagnostics = 6;  // mse, peak, hit_rate, weight_norm, iterations, evaluations

struct QKSolverOptions {
  double weight_norm = 0;  // exactly one of weight_norm and peak is positive
  double peak = 0;
  int64_t num_starts = 1;
  int64_t max_iterations = 200;
  double tolerance = 1e-2;  // see LbfgsOptions
};

namespace detail {

constexpr double kFirstPeak = 0.5;       // a higher wanted peak is approached from here
constexpr double kLargestNorm = 3000.0;  // in natural norms; sharp maps were seen at 20 to 100
constexpr double kNormStep = 1.4;
constexpr int kNormSteps = 24;  // 1.4^23 is the last power below kLargestNorm

CONVINIT_HD inline double logit(double p) {
  p = clamp(p, 1e-9, 1.0 - 1e-9);
  return std::log(p / (1.0 - p));
}

// The first norm of a rising series at which these directions reach the peak, or the one with the highest peak.
template <class Space>
CONVINIT_HD double norm_for_peak(Space& space, double peak, double natural) {
  double best_norm = natural, best_peak = 0;
  double norm = natural;
  for (int step = 0; step < kNormSteps && best_peak < peak; ++step, norm *= kNormStep) {
    space.weight_norm = norm;
    space.value();
    if (space.metrics.peak > best_peak) {
      best_norm = norm;
      best_peak = space.metrics.peak;
    } else if (space.metrics.peak < 0.7 * best_peak) {
      break;  // too sharp for these directions: what follows is worse
    }
  }
  return best_norm;
}

// Corrects the norm between short descents until the optimum's peak is the wanted one. The logit of the peak is nearly
// linear in the logarithm of the norm, so each correction is a secant step. Upwards it is kept small: a map that turns
// sharp too early saturates, wrong rows included, and a saturated softmax has no gradient to mend them.
// Leaves point and weight_norm at the wanted peak, or at the closest one met. Returns the iterations.
template <class Space>
CONVINIT_HD int64_t solve_for_peak(Space& space, LbfgsMemory& memory, double natural, const QKSolverOptions& options) {
  constexpr double kClose = 2e-3;
  const LbfgsOptions descent{.max_iterations = 12, .tolerance = options.tolerance};
  const double peak = options.peak;
  double closest_norm = space.weight_norm, closest_miss = INFINITY;
  double slope = 4.5;  // d logit(peak) / d log(norm); 3 to 6 were measured on sin-cos and learned embeddings
  double last_norm = 0, last_logit = 0;
  int64_t iterations = 0;
  int fruitless = 0;
  while (iterations < 3 * options.max_iterations && fruitless < 3) {
    space.normalise();
    const LbfgsResult result = minimise(space, memory, descent);
    iterations += result.iterations > 1 ? result.iterations : 1;
    space.value();
    const double reached = space.metrics.peak, miss = std::fabs(reached - peak);
    const double change = std::log(space.weight_norm / last_norm);
    if (miss < kClose && result.converged) return iterations;
    if (miss <= closest_miss) {
      space.keep();
      closest_norm = space.weight_norm;
      closest_miss = miss;
    }
    if (last_norm > 0 && std::fabs(change) > 0.02) {
      const double measured = (logit(reached) - last_logit) / change;
      slope = clamp(measured, 2.0, 9.0);
      if (change > 0.1) fruitless = measured < 0.2 ? fruitless + 1 : 0;  // the rank may allow no more
    }
    last_norm = space.weight_norm;
    last_logit = logit(reached);
    const double correction = clamp((logit(peak) - last_logit) / slope, -0.5, 0.15);
    space.weight_norm = std::fmin(space.weight_norm * std::exp(correction), kLargestNorm * natural);
    if (space.weight_norm == last_norm) break;
    if (std::fabs(correction) > 0.05) space.once([&] { memory.forget(); });
  }
  if (closest_miss < INFINITY) space.recall();
  space.weight_norm = closest_norm;
  return iterations;
}

}  // namespace detail

// Leaves the solution in point, weight_norm and metrics; if a peak cannot be reached, the highest one found.
// Returns the iterations.
template <class Space>
CONVINIT_HD int64_t search(Space& space, LbfgsMemory& memory, const QKSolverOptions& options) {
  space.once([&] { memory.clear(); });
  const bool for_peak = options.peak > 0;
  const double natural = for_peak ? space.natural_norm() : 0;
  double best = 0;
  for (int64_t s = 0; s < options.num_starts; ++s) {  // the most promising: lowest loss, or lowest norm for the peak
    space.start(s);
    space.weight_norm = options.weight_norm;
    const double score =
        for_peak ? detail::norm_for_peak(space, std::fmin(options.peak, detail::kFirstPeak), natural) : space.value();
    if (s == 0 || score < best) {
      best = score;
      space.keep();
    }
  }
  space.recall();
  space.weight_norm = for_peak ? best : options.weight_norm;
  const LbfgsOptions descent{.max_iterations = options.max_iterations, .tolerance = options.tolerance};
  const int64_t iterations =
      for_peak ? detail::solve_for_peak(space, memory, natural, options) : minimise(space, memory, descent).iterations;
  space.value();
  return iterations;
}

}  // namespace convinit
