#include "qk_problem.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace convinit {
namespace {

using Vector = std::vector<double>;

// Passes over several long vectors take a block of each in turn: what all of them share stays in the nearest cache.
constexpr size_t kBlock = 1024;

double dot(const double* a, const double* b, size_t size) {
  double s[4] = {0, 0, 0, 0};  // four chains, so that additions overlap; the order is fixed
  size_t i = 0;
  for (; i + 4 <= size; i += 4)
    for (size_t j = 0; j < 4; ++j) s[j] += a[i + j] * b[i + j];
  for (; i < size; ++i) s[0] += a[i] * b[i];
  return (s[0] + s[1]) + (s[2] + s[3]);
}

double dot(const Vector& a, const Vector& b) { return dot(a.data(), b.data(), a.size()); }

// The Space of lbfgs.h and qk_search.h. Vectors are [wq | wk_t].
class Problem {
 public:
  Problem(const QKBasis& basis, const int64_t* target, const std::vector<QKStart>& starts)
      : basis_(basis), starts_(starts), split_(static_cast<size_t>(basis.dq * basis.rank)),
        size_(split_ + static_cast<size_t>(basis.rank * basis.dk)), objective_(basis, target), point_(size_),
        next_(size_), next_gradient_(size_), step_(size_), weights_(size_),
        memory_(LbfgsMemory::kVectors, Vector(size_)) {}

  double weight_norm = 1;
  QKMetrics metrics;
  int64_t evaluations = 0;

  double evaluate() { return evaluate(point_, gradient().data()); }
  double value() { return evaluate(point_, nullptr); }
  double try_step(double length) {
    for (size_t i = 0; i < size_; ++i) next_[i] = point_[i] - length * step_[i];
    return evaluate(next_, next_gradient_.data());
  }

  void accept(int pair) {
    Vector &s = memory_[pair], &y = memory_[LbfgsMemory::change(pair)];
    for (size_t i = 0; i < size_; ++i) {
      s[i] = next_[i] - point_[i];
      y[i] = next_gradient_[i] - gradient()[i];
    }
    point_.swap(next_);
    gradient().swap(next_gradient_);
  }

  void inner_products(LbfgsMemory& memory, int pair) const {
    constexpr int kGradient = LbfgsMemory::kGradient;
    const bool with_pair = pair != LbfgsMemory::kNoPair;
    const int y = with_pair ? LbfgsMemory::change(pair) : LbfgsMemory::kNoPair;
    std::vector<int> columns{kGradient};
    if (with_pair) columns.insert(columns.end(), {pair, y});
    for (int i = 0; i < memory.count; ++i)
      columns.insert(columns.end(), {memory.slot(i), LbfgsMemory::change(memory.slot(i))});

    double by_gradient[LbfgsMemory::kVectors] = {}, by_pair[LbfgsMemory::kVectors] = {};
    for (size_t begin = 0; begin < size_; begin += kBlock) {
      const size_t block = std::min(kBlock, size_ - begin);
      for (const int column : columns) {
        const double* vector = memory_[column].data() + begin;
        by_gradient[column] += dot(memory_[kGradient].data() + begin, vector, block);
        if (with_pair) by_pair[column] += dot(memory_[pair].data() + begin, vector, block);
      }
    }
    const auto set = [&](int row, int column, double product) {
      memory.gram[row][column] = memory.gram[column][row] = product;
    };
    if (with_pair) {
      for (const int column : columns) {
        if (column == kGradient) continue;
        // With the change of the gradient: the change of the products with the gradient.
        if (column != pair && column != y) set(y, column, by_gradient[column] - memory.gram[kGradient][column]);
        set(pair, column, by_pair[column]);
      }
      set(y, y, dot(memory_[y], memory_[y]));
    }
    for (const int column : columns) set(kGradient, column, by_gradient[column]);
  }

  void combine(const LbfgsMemory& memory) {
    for (size_t begin = 0; begin < size_; begin += kBlock) {
      const size_t end = std::min(begin + kBlock, size_);
      for (size_t i = begin; i < end; ++i) step_[i] = memory.weights[LbfgsMemory::kGradient] * gradient()[i];
      for (int p = 0; p < memory.count; ++p)
        for (const int v : {memory.slot(p), LbfgsMemory::change(memory.slot(p))})
          for (size_t i = begin; i < end; ++i) step_[i] += memory.weights[v] * memory_[v][i];
    }
  }

  template <class F>
  void once(F&& f) {
    f();
  }

  void start(int64_t s) {
    std::copy_n(starts_[s].wq, split_, point_.begin());
    for (int64_t c = 0; c < basis_.rank; ++c)
      for (int64_t i = 0; i < basis_.dk; ++i) point_[split_ + c * basis_.dk + i] = starts_[s].wk[i * basis_.rank + c];
    normalise();
  }
  void normalise() { rescale(point_, 1.0); }
  void keep() { kept_ = point_; }
  void recall() { point_ = kept_; }

  double natural_norm() const {
    double q = 0, k = 0;
    for (float x : basis_.xq) q += static_cast<double>(x) * x;
    for (float x : basis_.xk) k += static_cast<double>(x) * x;
    return 1.0 / std::sqrt(basis_.scale * std::sqrt(q * k) / static_cast<double>(basis_.n));
  }

  void weights(Vector& wq, Vector& wk_t) {
    rescale(point_, weight_norm);
    wq.assign(point_.begin(), point_.begin() + split_);
    wk_t.assign(point_.begin() + split_, point_.end());
  }

 private:
  Vector& gradient() { return memory_[LbfgsMemory::kGradient]; }
  const Vector& gradient() const { return memory_[LbfgsMemory::kGradient]; }

  static double segment_norm(const Vector& x, size_t begin, size_t end) {
    double s = 0;
    for (size_t i = begin; i < end; ++i) s += x[i] * x[i];
    return std::max(std::sqrt(s), 1e-300);
  }

  // x scaled so that both factors have the given norm.
  void rescale(Vector& x, double norm) const {
    for (auto [begin, end] : {std::pair{size_t{0}, split_}, std::pair{split_, size_}}) {
      const double factor = norm / segment_norm(x, begin, end);
      for (size_t i = begin; i < end; ++i) x[i] *= factor;
    }
  }

  double evaluate(const Vector& x, double* grad) {
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
  void project(const Vector& x, double* grad, size_t begin, size_t end) const {
    double radial = 0;
    for (size_t i = begin; i < end; ++i) radial += grad[i] * weights_[i];
    radial /= weight_norm * weight_norm;
    const double factor = weight_norm / segment_norm(x, begin, end);
    for (size_t i = begin; i < end; ++i) grad[i] = factor * (grad[i] - radial * weights_[i]);
  }

  const QKBasis& basis_;
  const std::vector<QKStart>& starts_;
  size_t split_, size_;
  QKObjective objective_;
  Vector point_, next_, next_gradient_, step_, weights_, kept_;
  std::vector<Vector> memory_;  // as LbfgsMemory counts vectors; the last is the gradient at the point
};

}  // namespace

QKSolution solve_qk(const QKBasis& basis, const int64_t* target, const std::vector<QKStart>& starts,
                    const QKSolverOptions& options) {
  Problem problem(basis, target, starts);
  LbfgsMemory memory;
  QKSolution solution;
  solution.iterations = search(problem, memory, options);
  solution.metrics = problem.metrics;
  solution.weight_norm = problem.weight_norm;
  solution.evaluations = problem.evaluations;
  problem.weights(solution.wq, solution.wk_t);
  return solution;
}

}  // namespace convinit
