// x ~ Bernoulli(grey / white) for the images that an index selects.
#include "bernoulli.h"
#include "register.h"

namespace wakesleep {
namespace {

constexpr auto kBinarize = "binarize";

at::Tensor check_index(const at::Tensor& index_in, const at::Tensor& grey) {
  check_same_device(kBinarize, {"grey", grey}, {"index", index_in});
  TORCH_CHECK_TYPE(index_in.scalar_type() == at::kLong, kBinarize, ": expected index to be int64, got ",
                   index_in.scalar_type());
  TORCH_CHECK_VALUE(index_in.dim() == 1, kBinarize, ": expected index to have shape [B], got ", index_in.sizes());
  return index_in.contiguous();
}

// Checks the values on the CPU only. On CUDA, this would wait for the GPU, so the kernel itself checks them.
void check_index_values(const at::Tensor& index, int64_t images) {
  if (!index.defined() || !index.is_cpu()) {
    return;
  }
  const auto* image = index.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < index.size(0); ++row) {
    TORCH_CHECK_INDEX(image[row] >= 0 && image[row] < images, kBinarize, ": expected index in 0 .. ", images - 1,
                      ", the rows of grey, got ", image[row]);
  }
}

at::Tensor binarize(const at::Tensor& grey_in,  // [N, D]
                    const at::Tensor& key_in,   // [2]
                    int64_t white,
                    const std::optional<at::Tensor>& index_in,  // [B]
                    std::optional<at::ScalarType> dtype_in) {
  const at::ScalarType dtype = dtype_in.value_or(at::kByte);
  TORCH_CHECK_TYPE(grey_in.scalar_type() == at::kByte, kBinarize, ": expected grey to be uint8, got ",
                   grey_in.scalar_type());
  TORCH_CHECK_VALUE(grey_in.dim() == 2, kBinarize, ": expected grey to have shape [N, D], got ", grey_in.sizes());
  TORCH_CHECK_VALUE(white >= 1 && white <= 255, kBinarize, ": expected white in 1 .. 255, got ", white);
  check_key(kBinarize, key_in, {"grey", grey_in});
  const at::Tensor grey = with_contiguous_events(grey_in), key = key_in.contiguous();
  const int64_t N = grey.size(0), D = grey.size(1);
  const at::Tensor index = index_in ? check_index(*index_in, grey) : at::Tensor();
  const int64_t rows = index.defined() ? index.size(0) : N;
  const at::Tensor x = at::empty({rows, D}, grey.options().dtype(written_dtype(kBinarize, dtype, at::kFloat)));
  check_index_values(index, N);
  compute(
      x.device(),
      Binarize{dtype_of(x), grey.const_data_ptr<uint8_t>(), index.defined() ? index.const_data_ptr<int64_t>() : nullptr,
               key.const_data_ptr<int64_t>(), write(x), static_cast<int>(white), N, grey.stride(0), rows, D});
  return as_dtype(x, dtype);
}

}  // namespace

WAKESLEEP_OPS(m) { m.impl("binarize", binarize); }

}  // namespace wakesleep
