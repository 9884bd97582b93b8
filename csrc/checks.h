// What every op needs from LibTorch's stable ABI, and the checks that its arguments share.
//
// Python checks arguments first and words the errors for people; what is checked here only keeps a direct call
// of torch.ops.convinit.* from reading or writing out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace convinit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

}  // namespace convinit

// CONVINIT_CHECK_DTYPE(offsets, Long): offsets must have dtype Long.
#define CONVINIT_CHECK_DTYPE(tensor, dtype)                                \
  STD_TORCH_CHECK((tensor).scalar_type() == ::convinit::ScalarType::dtype, \
                  "convinit: " #tensor " must have dtype " #dtype)
