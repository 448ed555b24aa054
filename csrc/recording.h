// Calls of operators, recorded while they are made, to be made again: to a CPU's operators what a CUDA graph is to
// kernels. Neither Python nor autograd stands between the calls of a replay.
//
// Tensors that come from outside stay where they are, and are read and written there anew; so do numbers, as they were.
// Arguments are copied to where they were when the calls were recorded.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace wakesleep {

// To be used by one thread at a time.
class Recording {
 public:
  explicit Recording(std::vector<at::Tensor> arguments) : arguments_(std::move(arguments)) {}

  // Calls an operator below autograd, and notes it; its results take the place of its arguments on the stack.
  void call(const c10::OperatorHandle& op, torch::jit::Stack& stack);

  // Has a replay return this tensor, or a copy if it shares memory with others; comes last, before stop().
  void returns(const at::Tensor& result);

  // The calls once more, in their order, on other arguments like the first.
  at::Tensor replay(const std::vector<at::Tensor>& arguments);

  // Between them, this is the recording that the thread is at.
  void start();
  void stop();

  // Whether every call was one that can be repeated. One that tells Python what it finds in a tensor cannot, nor can
  // one that returns as many elements as it finds.
  bool is_repeatable() const { return repeatable_; }

  // The recording that this thread is at, or null.
  static const Recording* current();

 private:
  // A tensor's place on a stack: an argument, or an element of one that is a list.
  struct Place {
    size_t argument;
    std::optional<size_t> element;
  };
  // A value is a tensor that a call has returned.
  struct Link {
    Place place;
    size_t value;
  };
  struct Call {
    c10::OperatorHandle op;
    torch::jit::Stack arguments;  // without the values among them
    std::vector<Link> uses, results;
    std::vector<size_t> last_uses;  // values that no later call gets
  };

  template <typename Body>
  static void for_tensors(const torch::jit::Stack& stack, const Body& body);
  static void put(torch::jit::Stack& stack, const Place& place, const at::Tensor& tensor);
  void note_results(Call& made, const torch::jit::Stack& results);
  bool may_be_read(const Call& made) const;
  void keep_needed_calls();

  const std::vector<at::Tensor> arguments_;
  std::vector<Call> calls_;
  size_t values_ = 0;
  size_t result_ = 0;
  bool repeatable_ = true;

  // While recording: the values by their tensors, which are held weakly, so that no other takes an address over.
  std::unordered_map<const c10::TensorImpl*, size_t> value_of_;
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>> addresses_;
  std::unordered_set<size_t> ones_;
  std::unordered_set<size_t> own_;  // that share no memory with what a call got
};

}  // namespace wakesleep
