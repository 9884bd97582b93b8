// Limited-memory BFGS with a backtracking line search, for smooth functions of a few thousand to a million variables.
// Liu & Nocedal, "On the limited memory BFGS method for large scale optimization", Math. Programming 45 (1989).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace convinit {

struct LbfgsOptions {
  int64_t max_iterations = 200;
  double tolerance = 1e-2;   // stop when `window` iterations together lowered the value by less than this share of it
  int64_t window = 10;
  double first_step = 0.1;   // length of the first step, in the units of x
};

struct LbfgsResult {
  double value = 0;
  int64_t iterations = 0;
  bool converged = false;    // stopped by the tolerance, or because no step lowers the value any more
};

namespace detail {
inline double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double s[4] = {0, 0, 0, 0};  // four chains, so that additions overlap; the order is fixed
  size_t i = 0;
  for (; i + 4 <= a.size(); i += 4)
    for (size_t j = 0; j < 4; ++j) s[j] += a[i + j] * b[i + j];
  for (; i < a.size(); ++i) s[0] += a[i] * b[i];
  return (s[0] + s[1]) + (s[2] + s[3]);
}
inline void add_scaled(std::vector<double>& y, double alpha, const std::vector<double>& x) {
  for (size_t i = 0; i < y.size(); ++i) y[i] += alpha * x[i];
}
}  // namespace detail

class Lbfgs {
 public:
  explicit Lbfgs(int64_t memory = 10) : memory_(memory) {}

  // Lowers f from x, in place. `f(x, grad)` returns the value and fills grad. The curvature learnt in one call serves
  // the next, which is right where f has hardly changed in between; `forget` drops it.
  template <class Function>
  LbfgsResult minimise(Function&& f, std::vector<double>& x, const LbfgsOptions& options);

  void forget() { pairs_.clear(); }

 private:
  struct Pair {
    std::vector<double> s, y;  // step, change of the gradient
    double rho;                // 1 / <s, y>
  };

  void direction(const std::vector<double>& grad, double first_step, std::vector<double>& out);
  void learn(const std::vector<double>& x, const std::vector<double>& grad, const std::vector<double>& next,
             const std::vector<double>& next_grad);

  int64_t memory_;
  std::vector<Pair> pairs_;  // oldest first
  std::vector<double> alpha_;
};

// The two-loop recursion: out = H grad, H the inverse Hessian that the pairs stand for.
inline void Lbfgs::direction(const std::vector<double>& grad, double first_step, std::vector<double>& out) {
  using detail::add_scaled, detail::dot;
  out = grad;
  alpha_.assign(pairs_.size(), 0.0);
  for (size_t i = pairs_.size(); i-- > 0;) {
    alpha_[i] = pairs_[i].rho * dot(pairs_[i].s, out);
    add_scaled(out, -alpha_[i], pairs_[i].y);
  }
  const double h0 = pairs_.empty() ? first_step / std::max(std::sqrt(dot(grad, grad)), 1e-300)
                                   : 1.0 / (pairs_.back().rho * dot(pairs_.back().y, pairs_.back().y));
  for (double& d : out) d *= h0;
  for (size_t i = 0; i < pairs_.size(); ++i)
    add_scaled(out, alpha_[i] - pairs_[i].rho * dot(pairs_[i].y, out), pairs_[i].s);
}

inline void Lbfgs::learn(const std::vector<double>& x, const std::vector<double>& grad, const std::vector<double>& next,
                         const std::vector<double>& next_grad) {
  using detail::dot;
  Pair pair{std::vector<double>(x.size()), std::vector<double>(x.size()), 0.0};
  for (size_t i = 0; i < x.size(); ++i) {
    pair.s[i] = next[i] - x[i];
    pair.y[i] = next_grad[i] - grad[i];
  }
  const double curvature = dot(pair.s, pair.y);
  if (!(curvature > 1e-10 * std::sqrt(dot(pair.s, pair.s) * dot(pair.y, pair.y)))) return;
  pair.rho = 1.0 / curvature;
  if (static_cast<int64_t>(pairs_.size()) == memory_) pairs_.erase(pairs_.begin());
  pairs_.push_back(std::move(pair));
}

template <class Function>
LbfgsResult Lbfgs::minimise(Function&& f, std::vector<double>& x, const LbfgsOptions& options) {
  const size_t n = x.size();
  std::vector<double> grad(n), step(n), next(n), next_grad(n);
  LbfgsResult result;
  result.value = f(x, grad);
  std::vector<double> history{result.value};

  while (result.iterations < options.max_iterations) {
    direction(grad, options.first_step, step);
    const double slope = -detail::dot(grad, step);
    double length = 1.0, value = 0;
    bool lower = false;
    for (int tries = 0; slope < 0 && !lower && tries < 25; ++tries) {
      for (size_t i = 0; i < n; ++i) next[i] = x[i] - length * step[i];
      value = f(next, next_grad);
      lower = value <= result.value + 1e-4 * length * slope;
      if (!lower) {  // to the minimum of the parabola through both values and the slope, within sane bounds
        const double parabola = -0.5 * slope * length / (value - result.value - slope * length);
        length *= std::isfinite(parabola) ? std::fmin(0.5, std::fmax(0.1, parabola)) : 0.1;
      }
    }
    if (!lower) {
      result.converged = pairs_.empty();
      if (result.converged) break;
      forget();  // the curvature misled: try once more along the plain gradient
      continue;
    }
    learn(x, grad, next, next_grad);
    x.swap(next);
    grad.swap(next_grad);
    result.value = value;
    ++result.iterations;
    history.push_back(value);
    const int64_t last = static_cast<int64_t>(history.size()) - 1;
    result.converged = last >= options.window && history[last - options.window] - value < options.tolerance * value;
    if (result.converged) break;
  }
  return result;
}

}  // namespace convinit
