// Records operator calls and replays them, as a CUDA graph does with kernels. A replay runs without Python or autograd
// between the calls.
//
// A replay reads and writes external tensors (those that the recorded calls did not create) in place. Python numbers
// keep their recorded values. The arguments of a replay are copied into the arguments of the recording. Tensors that
// the recorded calls create and that outlive the recording, such as gradients, are overwritten by every replay.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace wakesleep {

// This class is not thread-safe: only one thread at a time may use a recording.
class Recording {
 public:
  explicit Recording(std::vector<at::Tensor> arguments) : arguments_(std::move(arguments)) {}

  // Calls an operator below autograd, and records the call. On the stack, the results replace the arguments.
  void call(const c10::OperatorHandle& op, torch::jit::Stack& stack);

  // Makes every replay return these tensors. It records a copy of each tensor that may share memory with another
  // tensor. It must be the last call before stop().
  void returns(const std::vector<at::Tensor>& results);

  // Ends the recording. left_behind() then returns the tensors that the calls created and that are still referenced.
  void stop();

  // Repeats the calls in the recorded order. The arguments must have the shapes and dtypes of the recording's
  // arguments.
  std::vector<at::Tensor> replay(const std::vector<at::Tensor>& arguments);

  // Restores the previous values of the external tensors that were modified, and frees the saved copies.
  void undo();

  // The name of an operator that cannot be replayed, or an empty string if there is none. Such an operator returns the
  // value of a tensor to Python, or a tensor whose shape depends on values.
  const std::string& unrepeatable() const { return unrepeatable_; }

  // External tensors: those that the calls used but did not create. The list excludes the arguments of the recording
  // and the constants that were created from Python numbers.
  const std::vector<at::Tensor>& outside() const { return outside_; }
  // Aliases of the external tensors that were modified, including arguments.
  const std::vector<at::Tensor>& written() const { return written_; }
  // Tensors that the calls created and that outlive the recording.
  std::vector<at::Tensor> left_behind() const;

 private:
  // The place of a tensor on a stack: an argument, or an element of a list argument.
  struct Place {
    size_t argument;
    std::optional<size_t> element;
  };
  // Connects a place to a value. Values are the tensors that the calls returned, numbered in order.
  struct Link {
    Place place;
    size_t value;
  };
  struct Call {
    c10::OperatorHandle op;
    torch::jit::Stack arguments;  // tensors returned by earlier calls are undefined here
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
  std::vector<at::Tensor> written_, saved_;  // aliases of modified tensors; copies of their old contents, until undo()
  std::vector<std::pair<at::Tensor, size_t>> left_behind_;

  // These members are used only while recording. value_of_ maps a tensor to its value. The weak references in
  // addresses_ prevent the addresses of these tensors from being reused.
  std::unordered_map<const c10::TensorImpl*, size_t> value_of_;
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>> addresses_;
  std::unordered_set<const c10::TensorImpl*> seen_outside_;
  std::unordered_set<const c10::StorageImpl*> own_storages_;
  std::unordered_set<size_t> ones_;
  std::unordered_set<size_t> own_;  // values that share no memory with the arguments of their call
};

}  // namespace wakesleep
