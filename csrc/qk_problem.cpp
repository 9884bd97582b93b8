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

constexpr double kFirstPeak = 0.5;  // a higher wanted peak is approached from here
constexpr double kSmallestNorm = 1e-3, kLargestNorm = 1e3;

// The smallest weight norm at which these directions reach the peak, by bisection of its logarithm; the largest norm
// where they do not.
double norm_for_peak(NormedObjective& f, const std::vector<double>& x, double peak) {
  double low = std::log(kSmallestNorm), high = std::log(kLargestNorm);
  for (int i = 0; i < 10; ++i) {
    const double middle = 0.5 * (low + high);
    f.weight_norm = std::exp(middle);
    f(x);
    (f.metrics.peak < peak ? low : high) = middle;
  }
  return std::exp(high);
}

// Corrects the norm between short descents until the optimum's peak is the wanted one. The logit of the peak is nearly
// linear in the logarithm of the norm, so each correction is a secant step. Upwards it is kept small: a map that turns
// sharp too early saturates, wrong rows included, and a saturated softmax has no gradient to mend them.
void solve_for_peak(NormedObjective& f, std::vector<double>& x, double peak, const QKSolverOptions& options,
                    QKSolution& solution) {
  constexpr double kClose = 2e-3;
  Lbfgs minimiser;
  const LbfgsOptions descent{.max_iterations = 12, .tolerance = options.tolerance};
  double slope = 4.5;  // d logit(peak) / d log(norm); 3 to 6 were measured on sin-cos and learned embeddings
  double last_norm = 0, last_logit = 0;
  int fruitless = 0;
  while (solution.iterations < 3 * options.max_iterations) {
    f.rescale(x, 1.0);
    const LbfgsResult result = minimiser.minimise(f, x, descent);
    solution.iterations += std::max<int64_t>(result.iterations, 1);
    f(x);
    const double reached = f.metrics.peak, change = std::log(f.weight_norm / last_norm);
    if (std::fabs(reached - peak) < kClose && result.converged) return;
    if (last_norm > 0 && std::fabs(change) > 0.02) {
      const double measured = (logit(reached) - last_logit) / change;
      slope = std::clamp(measured, 2.0, 9.0);
      if (change > 0.1) fruitless = measured < 0.2 ? fruitless + 1 : 0;
      if (fruitless >= 3) return;  // more norm no longer helps: the rank allows no more
    }
    if (reached < peak && f.weight_norm >= kLargestNorm) return;
    last_norm = f.weight_norm;
    last_logit = logit(reached);
    const double correction = std::clamp((logit(peak) - last_logit) / slope, -0.5, 0.15);
    f.weight_norm = std::clamp(f.weight_norm * std::exp(correction), kSmallestNorm, kLargestNorm);
    if (std::fabs(correction) > 0.05) minimiser.forget();
  }
}

}  // namespace

QKSolution solve_qk(const QKBasis& basis, const int64_t* target, const std::vector<QKStart>& starts,
                    std::optional<double> weight_norm, std::optional<double> peak, const QKSolverOptions& options) {
  NormedObjective f(basis, target);
  QKSolution solution;
  std::vector<double> x;
  double best = INFINITY;
  for (const QKStart& start : starts) {  // the most promising start: lowest loss, or lowest norm for the peak
    std::vector<double> candidate = pack(basis, start);
    f.weight_norm = weight_norm.value_or(0);
    const double score = peak ? norm_for_peak(f, candidate, std::min(*peak, kFirstPeak)) : f(candidate);
    if (x.empty() || score < best) {
      best = score;
      x = std::move(candidate);
    }
  }
  if (peak) {
    f.weight_norm = best;
    solve_for_peak(f, x, *peak, options, solution);
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
