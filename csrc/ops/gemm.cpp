#include "gemm.h"

#include "../settings.h"

namespace wakesleep {
namespace {

// ---- small batches -------------------------------------------------------------------------------------------------

// Returns whether the rows are at most the chosen limit, or else the measured limit.
bool is_small_batch(int64_t rows, int64_t measured) { return rows <= settings::small_batch.get().value_or(measured); }

// ---- our GEMMs -----------------------------------------------------------------------------------------------------

bool is_empty(const Gemm& gemm) { return gemm.M * gemm.K * gemm.N == 0; }

bool suits_packed_gemm(const Backend& backend, const Gemm& gemm) {
  return backend.packed_gemm != nullptr && cpu::instruction_set() == cpu::InstructionSet::avx2 &&
         gemm.a_dtype == at::kFloat && gemm.b_dtype == at::kFloat && !is_empty(gemm);
}

bool suits_skinny_gemm(const Backend& backend, const Gemm& gemm) {
  constexpr int64_t kTermsPerRow = 16;
  const cpu::InstructionSet set = cpu::instruction_set();
  if (backend.skinny_gemm == nullptr || set == cpu::InstructionSet::baseline || gemm.a_dtype != gemm.b_dtype ||
      c10::isReducedFloatingType(gemm.a_dtype) || is_empty(gemm)) {
    return false;
  }
  if (gemm.b_column != 1) {  // forward: dot products of rows
    return gemm.b_row == 1 && gemm.a_column == 1 && is_small_batch(gemm.M, std::max<int64_t>(1, gemm.K / kTermsPerRow));
  }
  const int64_t measured = set == cpu::InstructionSet::avx512 ? 12 : 24;
  return is_small_batch(gemm.M, measured) || (gemm.a_row == 1 && is_small_batch(gemm.K, measured));
}

Matrix matrix(const at::Tensor& of) { return {read(of), of.stride(0), of.stride(1)}; }

at::Tensor skinny_product(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor y = at::empty({a.size(0), b.size(1)}, a.options());
  launch(a.device(), backend_of(a.device()).skinny_gemm,
         SkinnyGemm{dtype_of(a), matrix(a), matrix(b), write(y), a.size(0), a.size(1), b.size(1)});
  return y;
}

void packed_product(const at::Tensor& y, const at::Tensor& a, const at::Tensor& b, bool adds) {
  launch(a.device(), backend_of(a.device()).packed_gemm,
         PackedGemm{matrix(a), matrix(b), static_cast<float*>(write(y)), a.size(0), a.size(1), b.size(1), adds, nullptr,
                    Activation::identity});
}

// ---- oneDNN --------------------------------------------------------------------------------------------------------

constexpr int64_t kWorthOneDnn = 1 << 20;  // with fewer multiplications in float32, a call costs more than it saves

// Returns true if the processor has AVX-512 but MKL does not use it.
bool blas_leaves_out_avx512() {
#ifdef __x86_64__
  return at::hasMKL() && __builtin_cpu_supports("avx512f") && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

// Returns an operator of torch, if this torch has it.
template <typename Signature>
std::optional<c10::TypedOperatorHandle<Signature>> find_operator(const char* name) {
  const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
  return op ? std::optional(op->typed<Signature>()) : std::nullopt;
}

// Returns the operator that computes x weight^T with oneDNN.
using OneDnnLinear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                                std::string_view, c10::List<std::optional<at::Scalar>>,
                                std::optional<std::string_view>);
const std::optional<c10::TypedOperatorHandle<OneDnnLinear>>& onednn_linear() {
  static const auto found = find_operator<OneDnnLinear>("mkldnn::_linear_pointwise");
  return found;
}

// Returns true if a matrix [M, N] is row-major or column-major, possibly with padding between rows or columns.
bool is_plain(int64_t M, int64_t N, int64_t row, int64_t column) {
  return (column == 1 && row >= std::max<int64_t>(1, N)) || (row == 1 && column >= std::max<int64_t>(1, M));
}

// Returns true if the processor multiplies bfloat16 numbers, with AVX-512 or in its matrix units, and oneDNN may use
// these instructions. ONEDNN_MAX_CPU_ISA can forbid them.
bool multiplies_bfloat16() {
#ifdef __x86_64__
  const auto is_supported = find_operator<bool()>("mkldnn::_is_mkldnn_bf16_supported");
  return __builtin_cpu_supports("avx512bf16") && onednn_linear() && is_supported && is_supported->call();
#else
  return false;
#endif
}

bool suits_onednn(const Gemm& gemm) {
  static const bool is_better = blas_leaves_out_avx512() && onednn_linear();
  const bool is_faster = gemm.a_dtype == at::kBFloat16
                             ? gemm.is_layer  // at::mm is faster without bias and activation
                             : gemm.a_dtype == at::kFloat && is_better && gemm.M * gemm.K * gemm.N >= kWorthOneDnn;
  return is_faster && !is_empty(gemm) && gemm.device.is_cpu() && is_plain(gemm.M, gemm.K, gemm.a_row, gemm.a_column) &&
         is_plain(gemm.K, gemm.N, gemm.b_row, gemm.b_column) && at::globalContext().userEnabledMkldnn();
}

at::Tensor onednn_layer(const at::Tensor& h, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                        Activation f) {
  constexpr std::string_view kNames[] = {"none", "relu", "sigmoid", "tanh"};  // in the order of Activation
  return onednn_linear()->call(h, weight, bias, kNames[static_cast<size_t>(f)], c10::List<std::optional<at::Scalar>>(),
                               {});
}

}  // namespace

Method method_for(const Gemm& gemm) {
  const Backend& backend = backend_of(gemm.device);
  if (gemm.is_layer && backend.small_batch != nullptr && is_small_batch(gemm.M, backend.small_batch_rows)) {
    return Method::small_batch;
  }
  if (suits_skinny_gemm(backend, gemm)) {
    return Method::skinny_gemm;
  }
  if (suits_packed_gemm(backend, gemm)) {
    return Method::packed_gemm;
  }
  return suits_onednn(gemm) ? Method::onednn : Method::blas;
}

at::ScalarType operand_dtype(at::Device device, at::ScalarType dtype, int64_t multiplications) {
  static const bool has_bfloat16 = multiplies_bfloat16();
  const bool is_fast = dtype == at::kBFloat16 && has_bfloat16 && multiplications >= kWorthOneDnn / 2 &&
                       at::globalContext().userEnabledMkldnn();
  return device.is_cuda() || is_fast ? dtype : compute_dtype(dtype);
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type) {
  if (a.is_cpu() && c10::isReducedFloatingType(a.scalar_type()) && a.scalar_type() != type) {
    return product(a.to(at::kFloat), b.to(at::kFloat), type);
  }
  switch (method_for(Gemm::of(a, b))) {
    case Method::skinny_gemm:
      return in_type(skinny_product(a, b), type);
    case Method::packed_gemm: {
      const at::Tensor y = at::empty({a.size(0), b.size(1)}, a.options());
      packed_product(y, a, b, false);
      return in_type(y, type);
    }
    case Method::onednn:
      return in_type(onednn_layer(a, b.t(), {}, Activation::identity), type);
    default:
      return a.is_cuda() && type != a.scalar_type() ? at::mm(a, b, type) : in_type(at::mm(a, b), type);
  }
}

at::Tensor fast_product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type) {
  return a.is_cpu() ? in_type(product(a, b, a.scalar_type()), type) : product(a, b, type);
}

void add_product(const at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  const Method method = method_for(Gemm::of(a, b));
  if (sum.scalar_type() == a.scalar_type() && method == Method::packed_gemm) {
    packed_product(sum, a, b, true);
  } else if (sum.scalar_type() == a.scalar_type() && method != Method::onednn) {
    sum.addmm_(a, b);
  } else {
    sum.add_(fast_product(a, b, sum.scalar_type()));
  }
}

bool has_layer_output(Method method, Activation f) {
  return method == Method::packed_gemm || method == Method::onednn ||
         (method == Method::blas && f == Activation::identity);
}

at::Tensor layer_output(Method method, const Gemm& gemm, Activation f, const at::Tensor& h, const at::Tensor& weight,
                        const at::Tensor& bias, at::Tensor place) {
  if (method == Method::packed_gemm) {
    place = place.defined() ? place : at::empty({gemm.M, gemm.N}, h.options());
    launch(gemm.device, backend_of(gemm.device).packed_gemm,
           PackedGemm{{read(h), gemm.a_row, gemm.a_column},
                      {read(weight), gemm.b_row, gemm.b_column},
                      static_cast<float*>(write(place)),
                      gemm.M,
                      gemm.K,
                      gemm.N,
                      false,
                      static_cast<const float*>(read(bias)),
                      f});
    return place;
  }
  const at::Tensor of_type = in_type(bias, h.scalar_type());
  if (method == Method::onednn) {
    const at::Tensor y = onednn_layer(h, weight, of_type, f);
    return place.defined() ? place.copy_(y) : y;
  }
  return place.defined() ? at::addmm_out(place, of_type, h, weight.t()) : at::addmm(of_type, h, weight.t());
}

}  // namespace wakesleep
