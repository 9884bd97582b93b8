// Limited-memory BFGS with a backtracking line search, for smooth functions of a few thousand to a million variables.
// Liu & Nocedal, "On the limited memory BFGS method for large scale optimization", Math. Programming 45 (1989).
//
// One text for CPU and CUDA. The minimiser works with numbers alone; vectors belong to a `Space`, which may be one
// thread with arrays or many thread blocks that hold a slice each. All its threads run `minimise` with the same numbers:
//
//   double evaluate()                          the function at the point; fills the gradient there
//   double try_step(double length)             the same at next = point - length * step, of which it fills the gradient
//   void accept(int pair)                      keeps next - point and the gradient's change as that pair; moves to next
//   void inner_products(LbfgsMemory&, int pair)  fills the Gram matrix: row and column of the gradient, and of the pair
//                                                unless it is kNoPair
//   void combine(const LbfgsMemory&)           step = sum of weights * vectors
//   void once(f)                               one thread runs f, and then all see what it wrote
//
// All that the two-loop recursion needs of the vectors is their inner products. Keeping those (Chen et al., "Large-scale
// L-BFGS using MapReduce", NeurIPS 2014) makes a direction one joint reduction and one pass over the vectors, where the
// recursion on vectors would be 4 x kPairs operations that each wait for the one before.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace convinit {

struct LbfgsOptions {
  int64_t max_iterations = 200;
  double tolerance = 1e-2;  // stop when kWindow iterations together lowered the value by less than this share of it
  double first_step = 0.1;  // length of the first step, in the units of x
};

struct LbfgsResult {
  double value = 0;
  int64_t iterations = 0;
  bool converged = false;  // stopped by the tolerance, or because no step lowers the value any more
};

// What is learnt of the function. The curvature learnt in one call of `minimise` serves the next, which is right where
// the function has hardly changed in between; `forget` drops it.
struct LbfgsMemory {
  static constexpr int kPairs = 10;  // pairs in use; one more slot takes the candidate
  static constexpr int kSlots = kPairs + 1;
  static constexpr int kGradient = 2 * kSlots;  // vectors: steps [kSlots], changes of the gradient [kSlots], gradient
  static constexpr int kVectors = kGradient + 1;
  static constexpr int kNoPair = -1;
  static constexpr int kWindow = 10;

  double gram[kVectors][kVectors];
  double weights[kVectors];  // of the step that `direction` found
  double alpha[kPairs];
  double values[kWindow + 1];  // the latest ones, by iteration modulo their number
  double slope;                // of the function along -step
  int first, count;            // the pairs in use: slots first, first + 1, ...

  CONVINIT_HD void clear() {
    forget();
    for (int i = 0; i < kVectors; ++i) erase(i);
  }
  CONVINIT_HD void forget() { first = count = 0; }
  CONVINIT_HD void erase(int vector) {
    for (int j = 0; j < kVectors; ++j) gram[vector][j] = gram[j][vector] = 0;
  }
  CONVINIT_HD int slot(int i) const { return (first + i) % kSlots; }  // of the i-th oldest pair
  CONVINIT_HD int spare() const { return slot(count); }
  CONVINIT_HD static int change(int slot) { return kSlots + slot; }
  CONVINIT_HD double inverse_curvature(int slot) const { return 1.0 / gram[slot][change(slot)]; }

  // <vector, sum of weights * vectors>. Vectors out of use have weight 0 and a finite Gram matrix: a loop of fixed length,
  // in which loads and additions overlap, is what makes one GPU thread fast enough.
  CONVINIT_HD double inner(int vector) const {
    const double* row = gram[vector];
    double sum[4] = {0, 0, 0, 0};
    for (int j = 0; j < kVectors; ++j) sum[j % 4] += weights[j] * row[j];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  // The two-loop recursion: weights and slope of step = H gradient, H the inverse Hessian that the pairs stand for.
  CONVINIT_HD void direction(double first_step) {
    for (int j = 0; j < kGradient; ++j) weights[j] = 0;
    weights[kGradient] = 1;
    for (int i = count - 1; i >= 0; --i) {
      alpha[i] = inverse_curvature(slot(i)) * inner(slot(i));
      weights[change(slot(i))] -= alpha[i];
    }
    double h0;
    if (count == 0) {
      const double length = std::sqrt(gram[kGradient][kGradient]);
      h0 = first_step / (length > 1e-300 ? length : 1e-300);
    } else {
      const int latest = slot(count - 1);
      h0 = gram[latest][change(latest)] / gram[change(latest)][change(latest)];
    }
    for (int i = 0; i < count; ++i) weights[change(slot(i))] *= h0;
    weights[kGradient] *= h0;
    for (int i = 0; i < count; ++i) weights[slot(i)] += alpha[i] - inverse_curvature(slot(i)) * inner(change(slot(i)));
    slope = -inner(kGradient);
  }

  // Takes the spare pair into use if the function curves upwards along it.
  CONVINIT_HD void learn() {
    const int s = spare(), y = change(s);
    if (!(gram[s][y] > 1e-10 * std::sqrt(gram[s][s] * gram[y][y]))) {
      erase(s);
      erase(y);
    } else if (count < kPairs) {
      ++count;
    } else {
      first = slot(1);
    }
  }
};

// Lowers the function from the point, in place. `memory` is seen by all threads and written in `once` alone.
template <class Space>
CONVINIT_HD LbfgsResult minimise(Space& space, LbfgsMemory& memory, const LbfgsOptions& options) {
  constexpr int kKept = LbfgsMemory::kWindow + 1;
  LbfgsResult result;
  double best = space.evaluate();
  space.inner_products(memory, LbfgsMemory::kNoPair);
  space.once([&] { memory.values[0] = best; });

  while (result.iterations < options.max_iterations) {
    space.once([&] { memory.direction(options.first_step); });
    space.combine(memory);
    const double slope = memory.slope;
    double length = 1.0, value = 0;
    bool lower = false;
    for (int tries = 0; slope < 0 && !lower && tries < 25; ++tries) {
      value = space.try_step(length);
      lower = value <= best + 1e-4 * length * slope;
      if (!lower) {  // to the minimum of the parabola through both values and the slope, within sane bounds
        const double parabola = -0.5 * slope * length / (value - best - slope * length);
        length *= std::isfinite(parabola) ? std::fmin(0.5, std::fmax(0.1, parabola)) : 0.1;
      }
    }
    if (!lower) {
      result.converged = memory.count == 0;
      if (result.converged) break;
      space.once([&] { memory.forget(); });  // the curvature misled: try once more along the plain gradient
      continue;
    }
    const int pair = memory.spare();
    space.accept(pair);
    space.inner_products(memory, pair);
    best = value;
    const int64_t last = ++result.iterations;
    space.once([&] {
      memory.learn();
      memory.values[last % kKept] = value;
    });
    const double earlier = memory.values[(last + 1) % kKept];  // kWindow iterations ago
    result.converged = last >= LbfgsMemory::kWindow && earlier - value < options.tolerance * value;
    if (result.converged) break;
  }
  result.value = best;
  return result;
}

}  // namespace convinit
