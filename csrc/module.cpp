// The Python module `_C`. Importing it registers the operators of schemas.cpp. The module also reports how it was
// built, records operator calls, and watches the state that a recording depends on.
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "autograd/unit_gradient.h"
#include "backend.h"
#include "settings.h"
// One translation unit, because torch's headers take most of the compile time.
#include "runtime/recording.cpp"
#include "runtime/watch.cpp"

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

void def_setting(pybind11::module_& m, const char* name, wakesleep::Setting& setting) {
  m.def(
      name, [&setting](std::optional<int64_t> number) { setting.set(number); }, pybind11::arg("number"),
      "Set this number of csrc/settings.h. None restores that of the environment variable, or the default.");
}

void use_on_cpu(std::optional<uintptr_t> address) {
  wakesleep::use_on_cpu(address ? reinterpret_cast<const wakesleep::Backend*>(*address) : nullptr);
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
  def_setting(m, "set_small_batch", wakesleep::settings::small_batch);
  def_setting(m, "set_chunk_mib", wakesleep::settings::chunk_mib);
  def_setting(m, "set_dependent_launch", wakesleep::settings::dependent_launch);
  m.def("mark_unit_gradient", &wakesleep::autograd::mark_unit_gradient, pybind11::arg("ones"),
        "Make ops recognise a tensor of ones as an upstream gradient of 1.");
  m.def("use_on_cpu", use_on_cpu, pybind11::arg("address"),
        "Make the backend at an address compute on CPU tensors. None restores the CPU's own. For tests.");
  pybind11::class_<Recording>(m, "Recording", "Operator calls that can be replayed.")
      .def(pybind11::init<std::vector<at::Tensor>>())
      .def("call", call, "Call the operator with this name and overload, and record the call.")
      .def("returns", &Recording::returns, no_gil(), "Make every replay return these tensors.")
      .def("stop", &Recording::stop, "End the recording.")
      .def("replay", replay, pybind11::arg("arguments"), pybind11::arg("watch") = nullptr,
           "Repeat the calls on other arguments. If the watch does not hold, make no call and return None.")
      .def("undo", &Recording::undo, no_gil(), "Restore the previous values of the outside tensors that were modified.")
      .def_property_readonly("unrepeatable", &Recording::unrepeatable,
                             "The name of an operator that cannot be replayed, or an empty string.")
      .def_property_readonly("outside", &Recording::outside, "Tensors that the calls used but did not create.")
      .def_property_readonly("written", &Recording::written, "Aliases of the outside tensors that were modified.")
      .def_property_readonly("left_behind", &Recording::left_behind,
                             "Tensors that the calls created and that outlive the recording.");
  pybind11::class_<Watch>(m, "Watch", "The state that a recording depends on.")
      .def(pybind11::init([](const std::vector<at::Tensor>& tensors, const pybind11::tuple& places) {
             return Watch(tensors, places.ptr());
           }),
           "Record the current state. The caller must keep the places alive.")
      .def("holds", &Watch::holds, "Return True if nothing that is watched has changed.");
}
