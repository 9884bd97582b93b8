#include "positional_attention.h"

#include <memory>

#include "attention_tensors.h"
#include "instruction_sets.h"
#include "positional_attention_kernel.h"

namespace convinit {
namespace {

using namespace attention;

// --- the kernels ------------------------------------------------------------------------------------------------

struct Kernels {
  void (*forward)(const Problem&, int64_t b, int64_t h, int64_t first, int64_t last, const Operand& out, float* lse);
  void (*backward)(const Problem&, int64_t b, int64_t h, const Operand& dout, const Gradients&);
};

#define CONVINIT_KERNELS(set, width, T, mark)                                                                      \
  mark void forward_##set(const Problem& p, int64_t b, int64_t h, int64_t first, int64_t last, const Operand& out, \
                          float* lse) {                                                                            \
    attention::forward<width, T>(p, b, h, first, last, out, lse);                                                  \
  }                                                                                                                \
  mark void backward_##set(const Problem& p, int64_t b, int64_t h, const Operand& dout, const Gradients& to) {     \
    attention::backward<width, T>(p, b, h, dout, to);                                                              \
  }
CONVINIT_EACH_INSTRUCTION_SET(CONVINIT_KERNELS)

// For tensors of this kind.
Kernels kernels(Element element) {
#define CONVINIT_CHOICE(set, width, T, mark) \
  case InstructionSet::set: return {forward_##set, backward_##set};
  switch (best_instruction_set(element == Element::bfloat16)) { CONVINIT_EACH_INSTRUCTION_SET(CONVINIT_CHOICE) }
#undef CONVINIT_CHOICE
  return {};
}

// --- arguments --------------------------------------------------------------------------------------------------

struct Inputs {
  Input q, k, v;
  std::optional<Input> q_pos, k_pos;
  Problem problem;

  Inputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& q_pos_,
         const std::optional<Tensor>& k_pos_, double scale, double alpha)
      : q(checked(q_, q_)), k(checked(k_, q_)), v(checked(v_, q_)) {
    if (q_pos_) q_pos.emplace(checked(*q_pos_, q_, 1));
    if (k_pos_) k_pos.emplace(checked(*k_pos_, q_, 1));
    problem = {{q_.size(0), q_.size(1), q_.size(2), q_.size(3)},
               static_cast<float>(scale),
               static_cast<float>(alpha),
               q.operand,
               k.operand,
               v.operand,
               q_pos ? q_pos->operand : Operand{},
               k_pos ? k_pos->operand : Operand{}};
  }

  // x must have the sizes of q [B, heads, N, r] from dimension `from` on.
  static const Tensor& checked(const Tensor& x, const Tensor& q, int64_t from = 0) {
    STD_TORCH_CHECK(q.dim() == 4, "convinit: q must have shape [B, heads, N, r]");
    STD_TORCH_CHECK(x.dim() == 4 - from, "convinit: k, v, q_pos and k_pos must have the shape of q");
    for (int64_t d = from; d < 4; ++d)
      STD_TORCH_CHECK(x.size(d - from) == q.size(d), "convinit: k, v, q_pos and k_pos must have the shape of q");
    return x;
  }
};

}  // namespace

void positional_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& q_pos,
                              const std::optional<Tensor>& k_pos, Tensor out, Tensor lse, double scale, double alpha) {
  const Inputs inputs(q, k, v, q_pos, k_pos, scale, alpha);
  const Problem& p = inputs.problem;
  if (p.batch * p.heads * p.tokens * p.rank == 0) return;
  STD_TORCH_CHECK(out.is_contiguous() && lse.is_contiguous() && lse.scalar_type() == ScalarType::Float &&
                      lse.numel() == p.batch * p.heads * p.tokens,
                  "convinit: out and lse must be contiguous, and lse float32 [B, heads, N]");
  check_side_by_side(out, p);
  const Operand to = heads_of(operand(out, true), out, p.rank);
  float* sums = lse.mutable_data_ptr<float>();
  expect_writes(to, p);
  // Fewer heads than threads share the rows of each; a row is the same whoever makes it.
  const int64_t heads = p.batch * p.heads, threads = torch::stable::get_num_threads();
  const Parts parts(p.tokens, threads / heads, p.tokens);
  const Kernels kernel = kernels(p.q.element);
  torch::stable::parallel_for(
      0, heads * parts.count, grain(4 * parts.rows * p.tokens * p.rank), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t head = i / parts.count, part = i % parts.count;
          kernel.forward(p, head / p.heads, head % p.heads, parts.first(part), parts.last(part), to, sums);
        }
      });
}

namespace {

// `from` is the dimension of `of` that the gradient's first one is: 1 for those of position terms.
Operand gradient(const std::optional<Tensor>& x, const Tensor& of, int64_t from = 0) {
  return x ? operand(Inputs::checked(*x, of, from), true) : Operand{};
}

// The gradient of a position term, summed over images. A task takes a chunk of them and has a sum of its own, so that
// the order of additions is that of the images whatever the number of threads.
class PositionSum {
 public:
  PositionSum(const Problem& p, const Operand& to, int64_t chunks) : problem_(p), to_(to), chunks_(chunks) {
    if (to) data_.reset(new float[chunks * size()]);
    if (to) prefer_huge_pages(data_.get(), chunks * size() * static_cast<int64_t>(sizeof(float)));
  }

  // Those of a chunk [heads, N, padded rank], zero in head h.
  float* start(int64_t chunk, int64_t h) {
    if (!to_) return nullptr;
    float* sum = data_.get() + chunk * size();
    std::fill(sum + h * head_size(), sum + (h + 1) * head_size(), 0.0f);
    return sum;
  }

  void finish() {
    if (!to_) return;
    const int64_t ld = padded(problem_.rank);
    torch::stable::parallel_for(0, problem_.heads * problem_.tokens, 256, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float* sum = data_.get() + i * ld;
        for (int64_t chunk = 1; chunk < chunks_; ++chunk)
          for (int64_t c = 0; c < ld; ++c) sum[c] += sum[chunk * size() + c];
        simd::store_row<4>(to_.element, sum, problem_.rank, 1, to_.row(0, i / problem_.tokens, i % problem_.tokens));
      }
    });
  }

 private:
  int64_t head_size() const { return problem_.tokens * padded(problem_.rank); }
  int64_t size() const { return problem_.heads * head_size(); }

  const Problem& problem_;
  Operand to_;
  int64_t chunks_;
  std::unique_ptr<float[]> data_;
};

}  // namespace

void positional_attention_backward_cpu(const Tensor& dout_, const Tensor& q, const Tensor& k, const Tensor& v,
                                       const std::optional<Tensor>& q_pos, const std::optional<Tensor>& k_pos,
                                       std::optional<Tensor> dq, std::optional<Tensor> dk, std::optional<Tensor> dv,
                                       std::optional<Tensor> dq_pos, std::optional<Tensor> dk_pos, double scale,
                                       double alpha) {
  constexpr int64_t kTasks = 64;  // at least, if there are as many images
  const Inputs inputs(q, k, v, q_pos, k_pos, scale, alpha);
  const Problem& p = inputs.problem;
  if (p.heads * p.tokens * p.rank == 0) return;
  check_side_by_side(dout_, p);
  const Input dense_dout(dout_);
  const Operand dout = heads_of(dense_dout.operand, dense_dout.dense, p.rank);
  const Gradients images{.q = gradient(dq, q), .k = gradient(dk, q), .v = gradient(dv, q)};
  const int64_t wanted = (kTasks + p.heads - 1) / p.heads;
  const int64_t chunk = std::max<int64_t>((p.batch + wanted - 1) / wanted, 1);  // images
  const int64_t chunks = std::max<int64_t>((p.batch + chunk - 1) / chunk, 1);
  PositionSum q_sum(p, gradient(dq_pos, q, 1), chunks), k_sum(p, gradient(dk_pos, q, 1), chunks);
  if (p.batch > 0)
    for (const Operand& x : {images.q, images.k, images.v}) expect_writes(x, p);

  const Kernels kernel = kernels(p.q.element);
  torch::stable::parallel_for(0, chunks * p.heads, grain(10 * p.tokens * p.tokens * p.rank * chunk),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  const int64_t h = i % p.heads, first = i / p.heads * chunk;
                                  Gradients to = images;
                                  to.q_pos = q_sum.start(i / p.heads, h);
                                  to.k_pos = k_sum.start(i / p.heads, h);
                                  for (int64_t b = first; b < std::min(first + chunk, p.batch); ++b)
                                    kernel.backward(p, b, h, dout, to);
                                }
                              });
  q_sum.finish();
  k_sum.finish();
}

}  // namespace convinit
