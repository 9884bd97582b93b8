#include <algorithm>
#include <cmath>

#include "lbfgs.h"
#include "qk_problem.h"

namespace convinit {
namespace {

// Both factors in one vector x = [wq | wk_t]. The loss is taken at w q/|q|, w k/|k|: x is free, the weights it stands for
// keep the norm w each. (For given B = Wq Wk^T, equal norms are also the cheapest split.)
class NormedObjective {
 public:
  NormedObjective(const QKBasis& basis, const int64_t* target)
      : split_(static_cast<size_t>(basis.dq * basis.rank)), size_(split_ + static_cast<size_t>(basis.rank * basis.dk)),
        objective_(basis, target), weights_(size_) {}

  double weight_norm = 1;
  QKMetrics metrics;             // of the latest evaluation
  int64_t evaluations = 0;

  size_t size() const { return size_; }

  double operator()(const std::vector<double>& x, std::vector<double>& grad) { return evaluate(x, grad.data()); }
  double operator()(const std::vector<double>& x) { return evaluate(x, nullptr); }

  // x scaled so that both factors have the given norm.
  void rescale(std::vector<double>& x, double norm) const {
    for (auto [begin, end] : {std::pair{size_t{0}, split_}, std::pair{split_, size_}}) {
      const double factor = norm / segment_norm(x, begin, end);
      for (size_t i = begin; i < end; ++i) x[i] *= factor;
    }
  }

 private:
  static double segment_norm(const std::vector<double>& x, size_t begin, size_t end) {
    double s = 0;
    for (size_t i = begin; i < end; ++i) s += x[i] * x[i];
    return std::max(std::sqrt(s), 1e-300);
  }

  double evaluate(const std::vector<double>& x, double* grad) {
    weights_ = x;
    rescale(weights_, weight_norm);
    metrics = objective_(weights_.data(), weights_.data() + split_, grad, grad ? grad + split_ : nullptr);
    ++evaluations;
    if (grad != nullptr) {
      project(x, grad, 0, split_);
      project(x, grad, split_, size_);
    }
    return metrics.mse;
  }

  // Chain rule through w x/|x|: drop the radial part, then scale by w/|x|.
  void project(const std::vector<double>& x, double* grad, size_t begin, size_t end) const {
    double radial = 0;
    for (size_t i = begin; i < end; ++i) radial += grad[i] * weights_[i];
    radial /= weight_norm * weight_norm;
    const double factor = weight_norm / segment_norm(x, begin, end);
    for (size_t i = begin; i < end; ++i) grad[i] = factor * (grad[i] - radial * weights_[i]);
  }

  size_t split_, size_;
  QKObjective objective_;
  std::vector<double> weights_;
};

std::vector<double> pack(const QKBasis& b, const QKStart& start) {
  std::vector<double> x(start.wq, start.wq + b.dq * b.rank);
  for (int64_t c = 0; c < b.rank; ++c)
    for (int64_t i = 0; i < b.dk; ++i) x.push_back(start.wk[i * b.rank + c]);
  return x;
}

double logit(double p) {
  p = std::clamp(p, 1e-9, 1.0 - 1e-9);
  return std::log(p / (1.0 - p));
}

// A weight norm at which logits are about 1 at most: where a map begins to differ from a uniform one.
double natural_norm(const QKBasis& b) {
  double q = 0, k = 0;
  for (float x : b.xq) q += static_cast<double>(x) * x;
  for (float x : b.xk) k += static_cast<double>(x) * x;
  return 1.0 / std::sqrt(b.scale * std::sqrt(q * k) / static_cast<double>(b.n));
}

constexpr double kFirstPeak = 0.5;       // a higher wanted peak is approached from here
constexpr double kLargestNorm = 3000.0;  // in natural norms; sharp maps were seen at 20 to 100

// The first norm of a rising series at which these directions reach the peak, or the one with the highest peak.
double norm_for_peak(NormedObjective& f, const std::vector<double>& x, double peak, double natural) {
  double best_norm = natural, best_peak = 0;
  for (double norm = natural; norm <= kLargestNorm * natural && best_peak < peak; norm *= 1.4) {
    f.weight_norm = norm;
    f(x);
    if (f.metrics.peak > best_peak) {
      best_norm = norm;
      best_peak = f.metrics.peak;
    } else if (f.metrics.peak < 0.7 * best_peak) {
      break;  // too sharp for these directions: what follows is worse
    }
  }
  return best_norm;
}

// Corrects the norm between short descents until the optimum's peak is the wanted one. The logit of the peak is nearly
// linear in the logarithm of the norm, so each correction is a secant step. Upwards it is kept small: a map that turns
// sharp too early saturates, wrong rows included, and a saturated softmax has no gradient to mend them.
// Leaves x and f.weight_norm at the wanted peak, or at the closest one met.
void solve_for_peak(NormedObjective& f, std::vector<double>& x, double peak, double natural,
                    const QKSolverOptions& options, QKSolution& solution) {
  constexpr double kClose = 2e-3;
  Lbfgs minimiser;
  const LbfgsOptions descent{.max_iterations = 12, .tolerance = options.tolerance};
  std::vector<double> closest = x;
  double closest_norm = f.weight_norm, closest_miss = INFINITY;
  double slope = 4.5;  // d logit(peak) / d log(norm); 3 to 6 were measured on sin-cos and learned embeddings
  double last_norm = 0, last_logit = 0;
  int fruitless = 0;
  while (solution.iterations < 3 * options.max_iterations && fruitless < 3) {
    f.rescale(x, 1.0);
    const LbfgsResult result = minimiser.minimise(f, x, descent);
    solution.iterations += std::max<int64_t>(result.iterations, 1);
    f(x);
    const double reached = f.metrics.peak, change = std::log(f.weight_norm / last_norm);
    if (std::fabs(reached - peak) < kClose && result.converged) return;
    if (std::fabs(reached - peak) <= closest_miss) {
      closest = x;
      closest_norm = f.weight_norm;
      closest_miss = std::fabs(reached - peak);
    }
    if (last_norm > 0 && std::fabs(change) > 0.02) {
      const double measured = (logit(reached) - last_logit) / change;
      slope = std::clamp(measured, 2.0, 9.0);
      if (change > 0.1) fruitless = measured < 0.2 ? fruitless + 1 : 0;  // the rank may allow no more
    }
    last_norm = f.weight_norm;
    last_logit = logit(reached);
    const double correction = std::clamp((logit(peak) - last_logit) / slope, -0.5, 0.15);
    f.weight_norm = std::min(f.weight_norm * std::exp(correction), kLargestNorm * natural);
    if (f.weight_norm == last_norm) break;
    if (std::fabs(correction) > 0.05) minimiser.forget();
  }
  x = std::move(closest);
  f.weight_norm = closest_norm;
}

}  // namespace

QKSolution solve_qk(const QKBasis& basis, const int64_t* target, const std::vector<QKStart>& starts,
                    std::optional<double> weight_norm, std::optional<double> peak, const QKSolverOptions& options) {
  NormedObjective f(basis, target);
  const double natural = natural_norm(basis);
  QKSolution solution;
  std::vector<double> x;
  double best = INFINITY;
  for (const QKStart& start : starts) {  // the most promising start: lowest loss, or lowest norm for the peak
    std::vector<double> candidate = pack(basis, start);
    f.weight_norm = weight_norm.value_or(0);
    const double score = peak ? norm_for_peak(f, candidate, std::min(*peak, kFirstPeak), natural) : f(candidate);
    if (x.empty() || score < best) {
      best = score;
      x = std::move(candidate);
    }
  }
  if (peak) {
    f.weight_norm = best;
    solve_for_peak(f, x, *peak, natural, options, solution);
  } else {
    f.rescale(x, 1.0);
    const LbfgsOptions descent{.max_iterations = options.max_iterations, .tolerance = options.tolerance};
    solution.iterations = Lbfgs().minimise(f, x, descent).iterations;
  }
  f(x);
  solution.metrics = f.metrics;
  solution.weight_norm = f.weight_norm;
  solution.evaluations = f.evaluations;
  f.rescale(x, f.weight_norm);
  const auto split = x.begin() + basis.dq * basis.rank;
  solution.wq.assign(x.begin(), split);
  solution.wk_t.assign(split, x.end());
  return solution;
}

}  // namespace convinit
