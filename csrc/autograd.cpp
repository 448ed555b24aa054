// Compiles the dispatch keys above the backends, autograd and autocast, as one translation unit. torch's headers for
// these take 12 s to compile, each of the files 3 s.
#include "autograd/adam.cpp"
#include "autograd/autocast.cpp"
#include "autograd/bernoulli_log_prob.cpp"
#include "autograd/gaussian_kl.cpp"
#include "autograd/gaussian_log_prob.cpp"
#include "autograd/gaussian_parameters.cpp"
#include "autograd/gaussian_rsample.cpp"
#include "autograd/linear_bernoulli_log_prob.cpp"
#include "autograd/not_differentiable.cpp"
#include "autograd/perceptron.cpp"
#include "autograd/standard_gaussian_log_prob.cpp"
