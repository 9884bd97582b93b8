// The table of contents: the schemas of all ops, and their CPU kernels. Each .cu file registers its own CUDA kernel;
// fake kernels and other devices are registered in Python, beside each op's public function.
#include "checks.h"
#include "impulse_conv.h"
#include "impulse_matrix.h"
#include "positional_attention.h"
#include "qk_solver.h"
#include "shared_attention.h"

#include <cstring>
#include <string>

#define CONVINIT_STRING_(x) #x
#define CONVINIT_STRING(x) CONVINIT_STRING_(x)

namespace convinit {
namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

// What only the compiler knows, as "key=value" lines.
// The text travels as bytes: the stable ABI's own strings leak in torch before 2.14.
Tensor build_config() {
  const std::string text = std::string("torch_compiled=") + TORCH_VERSION +
                           "\nstable_abi=" + std::to_string(TORCH_FEATURE_VERSION >> 56) + "." +
                           std::to_string(TORCH_FEATURE_VERSION >> 48 & 0xff) + "\ncompiler=" + kCompiler +
                           "\ncxx_standard=" CONVINIT_STRING(__cplusplus);
  Tensor out = torch::stable::empty({static_cast<int64_t>(text.size())}, ScalarType::Byte);
  std::memcpy(out.mutable_data_ptr<uint8_t>(), text.data(), text.size());
  return out;
}

}  // namespace
}  // namespace convinit

STABLE_TORCH_LIBRARY(convinit, m) {
  m.def("apply_map_cpu(Tensor map, Tensor v, Tensor(a!) out) -> ()");
  m.def("build_config() -> Tensor");
  m.def("cuda_config() -> Tensor");  // of the CUDA library, where it is loaded
  m.def("impulse_conv(Tensor x, Tensor offsets, Tensor? gain, Tensor? bias) -> Tensor");
  m.def("impulse_matrix(Tensor offsets, int height, int width, int padding_mode, ScalarType dtype) -> Tensor");
  m.def("map_gradient_cpu(Tensor dout, Tensor v, Tensor(a!) dmap) -> ()");
  m.def(
      "positional_attention_cpu(Tensor q, Tensor k, Tensor v, Tensor? q_pos, Tensor? k_pos, Tensor(a!) out, "
      "Tensor(b!) lse, float scale, float alpha) -> ()");
  m.def(
      "positional_attention_backward_cpu(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? q_pos, Tensor? k_pos, "
      "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, Tensor(d!)? dq_pos, Tensor(e!)? dk_pos, float scale, "
      "float alpha) -> ()");
  m.def(
      "qk_solver(Tensor xq, Tensor xk, Tensor targets, Tensor wq_starts, Tensor wk_starts, float scale, "
      "Tensor? weight_norm, float peak, int max_iterations, float tolerance, Tensor(a!)? monitor=None) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(convinit, CompositeExplicitAutograd, m) {
  m.impl("build_config", TORCH_BOX(&convinit::build_config));
}

STABLE_TORCH_LIBRARY_IMPL(convinit, CPU, m) {
  m.impl("apply_map_cpu", TORCH_BOX(&convinit::apply_map_cpu));
  m.impl("impulse_conv", TORCH_BOX(&convinit::impulse_conv_cpu));
  m.impl("impulse_matrix", TORCH_BOX(&convinit::impulse_matrix_cpu));
  m.impl("map_gradient_cpu", TORCH_BOX(&convinit::map_gradient_cpu));
  m.impl("positional_attention_cpu", TORCH_BOX(&convinit::positional_attention_cpu));
  m.impl("positional_attention_backward_cpu", TORCH_BOX(&convinit::positional_attention_backward_cpu));
  m.impl("qk_solver", TORCH_BOX(&convinit::qk_solver_cpu));
}
