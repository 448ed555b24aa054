// Compiles autograd and autocast as one translation unit: torch's headers take 10 s to compile, and each of the
// included files takes 3 s more.
#include "autograd/adam.cpp"
#include "autograd/autocast.cpp"
#include "autograd/bernoulli_log_prob.cpp"
#include "autograd/gaussian_kl.cpp"
#include "autograd/gaussian_kl_between.cpp"
#include "autograd/gaussian_log_prob.cpp"
#include "autograd/gaussian_parameters.cpp"
#include "autograd/gaussian_rsample.cpp"
#include "autograd/linear_bernoulli_log_prob.cpp"
#include "autograd/mlp.cpp"
#include "autograd/not_differentiable.cpp"
#include "autograd/standard_gaussian_log_prob.cpp"
