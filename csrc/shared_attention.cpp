#include "shared_attention.h"

#include "attention_tensors.h"
#include "instruction_sets.h"
#include "shared_attention_kernel.h"

namespace convinit {
namespace {

using namespace attention;

struct Kernels {
  void (*apply)(const Sizes&, const Map&, const Operand& v, int64_t h, int64_t first, int64_t last, const Operand& out);
  void (*gradient)(const Sizes&, const Operand& dout, const Operand& v, int64_t h, int64_t first, int64_t last,
                   const Operand& dmap);
};

#define CONVINIT_KERNELS(set, width, T, mark)                                                                     \
  mark void apply_##set(const Sizes& s, const Map& map, const Operand& v, int64_t h, int64_t first, int64_t last, \
                        const Operand& out) {                                                                     \
    attention::apply_map<width, T>(s, map, v, h, first, last, out);                                               \
  }                                                                                                               \
  mark void gradient_##set(const Sizes& s, const Operand& dout, const Operand& v, int64_t h, int64_t first,       \
                           int64_t last, const Operand& dmap) {                                                   \
    attention::map_gradient<width, T>(s, dout, v, h, first, last, dmap);                                          \
  }
CONVINIT_EACH_INSTRUCTION_SET(CONVINIT_KERNELS)

// For values of this kind.
Kernels kernels(Element element) {
#define CONVINIT_CHOICE(set, width, T, mark) \
  case InstructionSet::set: return {apply_##set, gradient_##set};
  switch (best_instruction_set(element == Element::bfloat16)) { CONVINIT_EACH_INSTRUCTION_SET(CONVINIT_CHOICE) }
#undef CONVINIT_CHOICE
  return {};
}

Sizes sizes_of(const Tensor& v) {
  STD_TORCH_CHECK(v.dim() == 4, "convinit: v must have shape [B, heads, N, r]");
  return {v.size(0), v.size(1), v.size(2), v.size(3)};
}

void check_map(const Tensor& map, const Sizes& s) {
  STD_TORCH_CHECK(map.dim() == 3 && map.size(0) == s.heads && map.size(1) == s.tokens && map.size(2) == s.tokens,
                  "convinit: map and dmap must have shape [heads, N, N]");
}

}  // namespace

void apply_map_cpu(const Tensor& map, const Tensor& v, Tensor out) {
  const Sizes s = sizes_of(v);
  check_map(map, s);
  check_side_by_side(out, s);
  const Operand to = heads_of(operand(out, true), out, s.rank);
  if (s.batch * s.heads * s.tokens * s.rank == 0) return;
  const bool transposed = !has_dense_rows(map) && has_dense_rows(torch::stable::transpose(map, 1, 2));
  const Input rows(transposed ? torch::stable::transpose(map, 1, 2) : map), values(v);
  const Map of{rows.operand, transposed};
  expect_writes(to, s);
  const Kernels kernel = kernels(values.operand.element);
  // Fewer images at once where there would not be a task for each thread.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = (s.batch * s.heads + threads - 1) / threads;
  const int64_t together = std::min({images_together(s), s.batch, share});
  const int64_t chunks = (s.batch + together - 1) / together;
  torch::stable::parallel_for(
      0, s.heads * chunks, grain(2 * together * s.tokens * s.tokens * s.rank), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t first = i % chunks * together;
          kernel.apply(s, of, values.operand, i / chunks, first, std::min(first + together, s.batch), to);
        }
      });
}

void map_gradient_cpu(const Tensor& dout, const Tensor& v, Tensor dmap) {
  constexpr int64_t kTasksPerThread = 4;
  const Sizes s = sizes_of(v);
  check_map(dmap, s);
  check_side_by_side(dout, s);
  const Operand to = operand(dmap, true);
  if (s.heads * s.tokens == 0) return;
  const Input dense_dout(dout), values(v);
  const Operand from = heads_of(dense_dout.operand, dense_dout.dense, s.rank);
  const Kernels kernel = kernels(values.operand.element);
  // A row is the same whoever makes it. Sums over the images stay in a core's second cache.
  const int64_t wanted = (kTasksPerThread * torch::stable::get_num_threads() + s.heads - 1) / s.heads;
  const Parts parts(s.tokens, std::min(wanted, s.tokens / (2 * kRowBlock)), rows_together(s));
  torch::stable::parallel_for(
      0, s.heads * parts.count, grain(2 * s.batch * parts.rows * s.tokens * s.rank), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t part = i % parts.count;
          kernel.gradient(s, from, values.operand, i / parts.count, parts.first(part), parts.last(part), to);
        }
      });
}

}  // namespace convinit
