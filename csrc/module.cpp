// The Python module `_C`. Importing it registers the operators of library.cpp; it also says how it was built.
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

namespace {

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

}  // namespace

// It keeps no state of its own, so free-threaded Python need not take up its lock for it.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m, pybind11::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of wakesleep_ext, registered as torch.ops.wakesleep_ext.*";
  m.def("build_config", build_config, "How this binary was built: torch, CUDA and compiler versions.");
}
