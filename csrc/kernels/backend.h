// What a backend offers the host code. This file is the table of contents of the folder.
#pragma once

#include <tuple>

#include "adam.h"
#include "advance.h"
#include "bernoulli_log_prob.h"
#include "bernoulli_sample.h"
#include "binarize.h"
#include "column_sums.h"
#include "gaussian_kl.h"
#include "gaussian_kl_between.h"
#include "gaussian_log_prob.h"
#include "gaussian_rsample.h"
#include "gemm.h"
#include "linear_bernoulli_log_prob.h"
#include "linear_bernoulli_sample.h"
#include "mlp.h"
#include "small_batch.h"
#include "standard_gaussian_log_prob.h"
#include "write_key.h"

namespace wakesleep {

template <typename Call>
using Kernel = void (*)(const Call&, Stream);

template <typename... Calls>
using KernelsFor = std::tuple<Kernel<Calls>...>;

// The kernels that every backend has.
using Kernels =
    KernelsFor<WriteKey, GaussianRsample, GaussianRsampleBackward, BernoulliSample, Binarize, GaussianLogProb,
               GaussianLogProbBackward, GaussianLogProbAndGradients, StandardGaussianLogProb,
               StandardGaussianLogProbBackward, GaussianKl, GaussianKlBackward, GaussianKlBetween,
               GaussianKlBetweenBackward, BernoulliLogProb, BernoulliLogProbBackward, MlpOutput, MlpGradient,
               LinearBernoulliLogProb, LinearBernoulliGradient, LinearBernoulliSample, Adam, Advance>;

// The kernels that compute a layer of a small batch at once: the GEMM and the operations before and after it.
using SmallBatchKernels = KernelsFor<SmallBatchProducts, SmallBatchOutput, SmallBatchSample, SmallBatchGaussianSample,
                                     SmallBatchBernoulliGradient, SmallBatchGradients>;

struct Backend {
  Kernels kernels;
  const SmallBatchKernels* small_batch;   // null if the backend has none
  Kernel<SkinnyGemm> skinny_gemm;         // null if the backend has none
  Kernel<PackedGemm> packed_gemm;         // null if the backend has none
  Kernel<ColumnSums> column_sums;         // null if at::sum is as fast
  int64_t small_batch_rows;               // the largest batch for which small_batch beats the library
  int64_t (*rows_of_sum)(Dtype compute);  // the number of rows in each partial sum of MlpGradient and the like
};

namespace cpu {
extern const Backend kBackend;
}
namespace cuda {
extern const Backend kBackend;
}

}  // namespace wakesleep
