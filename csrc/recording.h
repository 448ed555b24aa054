// Calls of operators, recorded while they are made, to be made again: to a CPU's operators what a CUDA graph is to
// kernels. Neither Python nor autograd stands between the calls of a replay.
//
// Tensors that come from outside stay where they are, and every replay reads and writes them there. Numbers stay as
// they were. Arguments are copied to where they were when the calls were recorded. If the calls made a tensor that is
// still referenced when recording ends, such as a gradient, it gets the value of every replay.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <string>
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

  // Has a replay return these tensors, or a copy of one that shares memory with others; comes last, before stop().
  void returns(const std::vector<at::Tensor>& results);

  // Ends the recording, when its caller holds no tensor of it any more.
  void stop();

  // The calls once more, in their order, on other arguments like the first.
  std::vector<at::Tensor> replay(const std::vector<at::Tensor>& arguments);

  // Gives what was written to outside the values from before the recording, and frees the copies of these.
  void undo();

  // The operator that cannot be repeated, or an empty string. One that tells Python what it finds in a tensor cannot,
  // nor can one that returns as many elements as it finds.
  const std::string& unrepeatable() const { return unrepeatable_; }

  // Tensors that the calls got and did not make, apart from the arguments and from constants made of Python's numbers.
  const std::vector<at::Tensor>& outside() const { return outside_; }
  // Aliases of what was written to outside, arguments included.
  const std::vector<at::Tensor>& written() const { return written_; }
  // Tensors that the calls made and that others hold.
  std::vector<at::Tensor> left_behind() const;

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
  void note_outside(const Call& made);
  void save_what_is_written(const Call& made);
  void note_results(Call& made, const torch::jit::Stack& results);
  bool multiplies_by_one(const Call& made) const;
  void keep_needed_calls();

  const std::vector<at::Tensor> arguments_;
  std::vector<Call> calls_;
  size_t values_ = 0;
  std::vector<size_t> results_;
  std::string unrepeatable_;
  std::vector<at::Tensor> outside_;
  std::vector<at::Tensor> written_, saved_;  // aliases, and their values from before the call, until undo()
  std::vector<std::pair<at::Tensor, size_t>> left_behind_;

  // While recording: the values by their tensors, which are held weakly, so that no other takes an address over.
  std::unordered_map<const c10::TensorImpl*, size_t> value_of_;
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>> addresses_;
  std::unordered_set<const c10::TensorImpl*> seen_outside_;
  std::unordered_set<const c10::StorageImpl*> own_storages_;
  std::unordered_set<size_t> ones_;
  std::unordered_set<size_t> own_;  // that share no memory with what a call got
};

}  // namespace wakesleep
