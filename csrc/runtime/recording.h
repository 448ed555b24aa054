// Records calls of operators and makes them again, as a CUDA graph does with kernels. A replay runs without Python or
// autograd between the calls.
//
// A replay reads and writes tensors from outside in place. Numbers keep their recorded values. Arguments are copied
// into those of the recorded calls. A tensor that the calls made and that is still referenced when recording ends, such
// as a gradient, gets the value of every replay.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace wakesleep {

// Only one thread at a time may use it.
class Recording {
 public:
  explicit Recording(std::vector<at::Tensor> arguments) : arguments_(std::move(arguments)) {}

  // Calls an operator and records the call, below autograd. Its results replace its arguments on the stack.
  void call(const c10::OperatorHandle& op, torch::jit::Stack& stack);

  // Makes a replay return these tensors, copying any that shares memory with others. It is the last call before stop().
  void returns(const std::vector<at::Tensor>& results);

  // Ends the recording. Tensors of it that the caller still holds are left behind.
  void stop();

  // Makes the calls again, in their order, with other arguments like the first.
  std::vector<at::Tensor> replay(const std::vector<at::Tensor>& arguments);

  // Restores the outside tensors that were written to, and frees the saved copies.
  void undo();

  // The operator that cannot be replayed, or an empty string: it returns the content of a tensor to Python, or a shape
  // that depends on it.
  const std::string& unrepeatable() const { return unrepeatable_; }

  // Tensors that the calls used and did not make, except the arguments and constants from Python numbers.
  const std::vector<at::Tensor>& outside() const { return outside_; }
  // Aliases of the outside tensors that were written to, arguments included.
  const std::vector<at::Tensor>& written() const { return written_; }
  // Tensors that the calls made and that are still referenced.
  std::vector<at::Tensor> left_behind() const;

 private:
  // A tensor's place on a stack: an argument, or an element of a list argument.
  struct Place {
    size_t argument;
    std::optional<size_t> element;
  };
  // A value is a tensor that a call returned, by its number.
  struct Link {
    Place place;
    size_t value;
  };
  struct Call {
    c10::OperatorHandle op;
    torch::jit::Stack arguments;  // values are left undefined
    std::vector<Link> uses, results;
    std::vector<size_t> last_uses;  // values that no later call uses
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
  std::vector<at::Tensor> written_, saved_;  // aliases, and copies from before the call, until undo()
  std::vector<std::pair<at::Tensor, size_t>> left_behind_;

  // While recording: the values by their tensors. Weak references to these keep their addresses from being reused.
  std::unordered_map<const c10::TensorImpl*, size_t> value_of_;
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>> addresses_;
  std::unordered_set<const c10::TensorImpl*> seen_outside_;
  std::unordered_set<const c10::StorageImpl*> own_storages_;
  std::unordered_set<size_t> ones_;
  std::unordered_set<size_t> own_;  // values that share no memory with a call's arguments
};

}  // namespace wakesleep
