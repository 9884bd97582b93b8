// The ops of csrc as a Python module without torch, to be built with sanitizers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "impulse_conv.h"
#include "impulse_matrix.h"
#include "positional_attention.h"
#include "qk_solver.h"
#include "shared_attention.h"

namespace py = pybind11;
using convinit::ScalarType;
using convinit::Tensor;

namespace {

const std::map<std::string, ScalarType> kDtypes = {{"float64", ScalarType::Double}, {"float32", ScalarType::Float},
                                                   {"float16", ScalarType::Half},   {"bfloat16", ScalarType::BFloat16},
                                                   {"int64", ScalarType::Long},     {"bool", ScalarType::Bool}};

// A copy of the array's span with its strides, which must not be negative. bfloat16 numbers come as uint16.
Tensor from_numpy(const py::array& array, const std::string& dtype) {
  torch::stable::Sizes sizes, strides;
  for (py::ssize_t d = 0; d < array.ndim(); ++d) {
    sizes.push_back(array.shape(d));
    strides.push_back(array.strides(d) / array.itemsize());
  }
  Tensor tensor(sizes, strides, kDtypes.at(dtype));
  if (torch::stable::bytes_of(tensor.scalar_type()) != array.itemsize()) throw py::type_error("another item size");
  std::memcpy(tensor.data_ptr(), array.data(), tensor.bytes());
  return tensor;
}

py::bytes to_bytes(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  return py::bytes(static_cast<const char*>(dense.data_ptr()), dense.bytes());
}

}  // namespace

PYBIND11_MODULE(sanitized_core, m) {
  py::class_<Tensor>(m, "Tensor")
      .def(py::init(&from_numpy))
      .def_property_readonly("shape", &Tensor::sizes)
      .def("bytes", &to_bytes);
  m.def("set_threads", [](int64_t count) { torch::stable::threads = count; });
  m.def("apply_map", &convinit::apply_map_cpu);
  m.def("map_gradient", &convinit::map_gradient_cpu);
  m.def("positional_attention", &convinit::positional_attention_cpu);
  m.def("positional_attention_backward", &convinit::positional_attention_backward_cpu);
  m.def("impulse_conv", &convinit::impulse_conv_cpu);
  m.def("impulse_matrix", [](const Tensor& offsets, int64_t height, int64_t width, int64_t mode, std::string dtype) {
    return convinit::impulse_matrix_cpu(offsets, height, width, mode, kDtypes.at(dtype));
  });
  m.def("qk_solver", &convinit::qk_solver_cpu);
}
