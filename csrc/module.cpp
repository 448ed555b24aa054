// The Python module `_C`. Importing it registers the operators of schemas.cpp. It also reports how it was built,
// records calls of operators, and watches what a recording depends on.
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "runtime/recording.h"
#include "runtime/watch.h"

namespace {

using wakesleep::Recording;
using wakesleep::Watch;
using no_gil = pybind11::call_guard<pybind11::gil_scoped_release>;

pybind11::dict build_config() {
  pybind11::dict config;
  config["torch"] = TORCH_VERSION;
#ifdef WAKESLEEP_CUDA_VERSION
  config["cuda"] = WAKESLEEP_CUDA_VERSION;
#else
  config["cuda"] = pybind11::none();
#endif
  config["compiler"] = __VERSION__;
  return config;
}

pybind11::object call(Recording& recording, const std::string& name, const std::string& overload,
                      const pybind11::args& args, const pybind11::kwargs& kwargs) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
  const torch::jit::ToIValueAllowNumbersAsTensors as_dispatched(true);
  auto stack = torch::jit::createStackForSchema(op.schema(), torch::jit::tuple_slice(args), kwargs, std::nullopt);
  {
    const pybind11::gil_scoped_release no_gil;
    recording.call(op, stack);
  }
  return torch::jit::createPyObjectForStack(std::move(stack));
}

std::optional<std::vector<at::Tensor>> replay(Recording& recording, const std::vector<at::Tensor>& arguments,
                                              Watch* watch) {
  if (watch != nullptr && !watch->holds()) {
    return std::nullopt;
  }
  const pybind11::gil_scoped_release no_gil;
  return recording.replay(arguments);
}

}  // namespace

// The module has no state that threads share, so free-threaded Python need not enable the GIL for it.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m, pybind11::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of wakesleep_ext, registered as torch.ops.wakesleep_ext.*";
  m.def("build_config", build_config, "How this binary was built: torch, CUDA and compiler versions.");
  pybind11::class_<Recording>(m, "Recording", "Operator calls that can be made again.")
      .def(pybind11::init<std::vector<at::Tensor>>())
      .def("call", call, "Call the operator of this name and overload, and note it.")
      .def("returns", &Recording::returns, no_gil(), "Have these tensors returned by a replay.")
      .def("stop", &Recording::stop, "End the recording.")
      .def("replay", replay, pybind11::arg("arguments"), pybind11::arg("watch") = nullptr,
           "Make the calls once more, on other arguments; None, and no call, if the watch does not hold.")
      .def("undo", &Recording::undo, no_gil(), "Give what was written to the values from before.")
      .def_property_readonly("unrepeatable", &Recording::unrepeatable,
                             "The operator that tells what it found in a tensor; empty if none does.")
      .def_property_readonly("outside", &Recording::outside, "Tensors that the calls got and did not make.")
      .def_property_readonly("written", &Recording::written, "Aliases of what was written to.")
      .def_property_readonly("left_behind", &Recording::left_behind, "Tensors that the calls made and others hold.");
  pybind11::class_<Watch>(m, "Watch", "What a recording depends on.")
      .def(pybind11::init([](const std::vector<at::Tensor>& tensors, const pybind11::tuple& places) {
             return Watch(tensors, places.ptr());
           }),
           "Note what is so now. The caller keeps the places.")
      .def("holds", &Watch::holds, "Return whether everything that is watched is unchanged.");
}
