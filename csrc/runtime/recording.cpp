#include "recording.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace wakesleep {

void Recording::stop() {
  for (size_t value = 0; value < values_; ++value) {
    if (auto held = addresses_[value].lock()) {
      left_behind_.emplace_back(at::Tensor(std::move(held)), value);
    }
  }
  keep_needed_calls();
  value_of_.clear();
  addresses_.clear();
  seen_outside_.clear();
  own_storages_.clear();
  ones_.clear();
  own_.clear();
}

// Keeps the calls that have side effects, and the calls whose results are returned or used by another kept call. The
// loop visits the calls from last to first, so the first use that it finds is the last use of that value in a replay.
void Recording::keep_needed_calls() {
  std::unordered_set<size_t> needed(results_.begin(), results_.end());
  for (const auto& left : left_behind_) {
    needed.insert(left.second);
  }
  std::vector<Call> kept;
  for (auto call = calls_.rbegin(); call != calls_.rend(); ++call) {
    const auto& schema = call->op.schema();
    const bool does_something = schema.is_mutable() || schema.returns().empty() ||  // for example, an assertion
                                call->op.hasTag(at::Tag::nondeterministic_seeded);
    const auto is_needed = [&](const Link& result) { return needed.count(result.value) > 0; };
    if (!does_something && std::none_of(call->results.begin(), call->results.end(), is_needed)) {
      continue;
    }
    for (const auto* links : {&call->results, &call->uses}) {
      for (const Link& link : *links) {
        if (needed.insert(link.value).second) {
          call->last_uses.push_back(link.value);
        }
      }
    }
    kept.push_back(std::move(*call));
  }
  calls_.assign(std::make_move_iterator(kept.rbegin()), std::make_move_iterator(kept.rend()));
}

// Calls body(place, tensor) for every defined tensor on a stack.
template <typename Body>
void Recording::for_tensors(const torch::jit::Stack& stack, const Body& body) {
  const auto visit = [&](const Place& place, const c10::IValue& value) {
    if (value.isTensor() && value.toTensor().defined()) {
      body(place, value.toTensor());
    }
  };
  for (size_t argument = 0; argument < stack.size(); ++argument) {
    if (stack[argument].isList()) {
      const auto elements = stack[argument].toListRef();
      for (size_t element = 0; element < elements.size(); ++element) {
        visit({argument, element}, elements[element]);
      }
    } else {
      visit({argument, std::nullopt}, stack[argument]);
    }
  }
}

void Recording::put(torch::jit::Stack& stack, const Place& place, const at::Tensor& tensor) {
  if (place.element) {
    stack[place.argument].toList().set(*place.element, tensor);
  } else {
    stack[place.argument] = tensor;
  }
}

void Recording::call(const c10::OperatorHandle& op, torch::jit::Stack& stack) {
  Call made = {op, stack, {}, {}, {}};
  for_tensors(stack, [&](const Place& place, const at::Tensor& tensor) {
    if (const auto found = value_of_.find(tensor.unsafeGetTensorImpl()); found != value_of_.end()) {
      made.uses.push_back({place, found->second});
    }
  });
  if (multiplies_by_one(made)) {
    stack.clear();  // this operator returns nothing
    return;
  }
  const bool is_mutable = op.schema().is_mutable();
  if (op.hasTag(at::Tag::dynamic_output_shape) || op.hasTag(at::Tag::data_dependent_output)) {
    unrepeatable_ = c10::toString(op.operator_name());
  }
  note_outside(made);
  save_what_is_written(made);
  op.callBoxed(stack);
  note_results(made, stack);
  for (const Link& use : made.uses) {
    if (is_mutable) {
      ones_.erase(use.value);
    }
    put(made.arguments, use.place, {});
  }
  calls_.push_back(std::move(made));
}

// The gradient of a loss with respect to itself is 1. Multiplying in place by this 1 changes nothing, so the call is
// neither executed nor recorded.
bool Recording::multiplies_by_one(const Call& made) const {
  static const c10::OperatorName in_place("aten::_foreach_mul_", "Tensor");
  return made.op.operator_name() == in_place && !made.uses.empty() && made.uses.back().place.argument == 1 &&
         ones_.count(made.uses.back().value) > 0;
}

void Recording::note_outside(const Call& made) {
  static const c10::OperatorName of_a_constant("aten::lift_fresh", "");
  if (made.op.operator_name() == of_a_constant) {
    return;
  }
  for_tensors(made.arguments, [&](const Place&, const at::Tensor& tensor) {
    const auto* address = tensor.unsafeGetTensorImpl();
    const auto is_it = [&](const at::Tensor& argument) { return argument.unsafeGetTensorImpl() == address; };
    if (value_of_.count(address) == 0 && !address->is_wrapped_number() &&
        std::none_of(arguments_.begin(), arguments_.end(), is_it) && seen_outside_.insert(address).second) {
      outside_.push_back(tensor);
    }
  });
}

// Saves the tensors that a call modifies in place, except tensors in memory that the recorded calls allocated.
void Recording::save_what_is_written(const Call& made) {
  const auto& schema = made.op.schema();
  for_tensors(made.arguments, [&](const Place& place, const at::Tensor& tensor) {
    const auto* alias = schema.arguments()[place.argument].alias_info();
    const bool is_written = alias != nullptr && alias->isWrite();
    if (is_written && tensor.has_storage() && own_storages_.count(tensor.storage().unsafeGetStorageImpl()) == 0) {
      written_.push_back(tensor.alias());
      saved_.push_back(tensor.clone());
    }
  });
}

std::vector<at::Tensor> Recording::left_behind() const {
  std::vector<at::Tensor> tensors;
  for (const auto& left : left_behind_) {
    tensors.push_back(left.first);
  }
  return tensors;
}

void Recording::undo() {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  for (; !saved_.empty(); saved_.pop_back()) {
    written_[saved_.size() - 1].copy_(saved_.back());
  }
}

// Records the tensors that a call created, excluding arguments that it modified in place and returned.
void Recording::note_results(Call& made, const torch::jit::Stack& results) {
  static const c10::OperatorName ones_like("aten::ones_like", "");
  for_tensors(results, [&](const Place& place, const at::Tensor& tensor) {
    const auto* address = tensor.unsafeGetTensorImpl();
    bool is_argument = value_of_.count(address) > 0;
    for_tensors(made.arguments, [&](const Place&, const at::Tensor& argument) {
      is_argument |= argument.unsafeGetTensorImpl() == address;
    });
    if (is_argument) {
      return;
    }
    made.results.push_back({place, values_});
    value_of_[address] = values_;
    addresses_.emplace_back(tensor.getIntrusivePtr());
    if (made.op.operator_name() == ones_like) {
      ones_.insert(values_);
    }
    if (made.op.schema().returns()[place.argument].alias_info() == nullptr) {
      own_.insert(values_);
      if (tensor.has_storage()) {
        own_storages_.insert(tensor.storage().unsafeGetStorageImpl());
      }
    }
    ++values_;
  });
}

void Recording::returns(const std::vector<at::Tensor>& results) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  std::unordered_set<size_t> returned;
  for (const at::Tensor& result : results) {
    const auto found = value_of_.find(result.unsafeGetTensorImpl());
    if (found != value_of_.end() && own_.count(found->second) > 0 && returned.insert(found->second).second) {
      results_.push_back(found->second);
      continue;
    }
    torch::jit::Stack stack = {result, c10::IValue()};
    call(c10::Dispatcher::singleton().findSchemaOrThrow("aten::clone", ""), stack);
    results_.push_back(values_ - 1);
  }
}

std::vector<at::Tensor> Recording::replay(const std::vector<at::Tensor>& arguments) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  for (size_t argument = 0; argument < arguments.size(); ++argument) {
    arguments_[argument].copy_(arguments[argument]);
  }
  std::vector<at::Tensor> values(values_);
  torch::jit::Stack stack;
  for (Call& call : calls_) {
    for (const Link& use : call.uses) {
      put(call.arguments, use.place, values[use.value]);
    }
    stack = call.arguments;
    call.op.callBoxed(stack);
    for (const Link& use : call.uses) {
      put(call.arguments, use.place, {});
    }
    for (const auto& [place, value] : call.results) {
      const c10::IValue& result = stack[place.argument];
      values[value] = place.element ? result.toListRef()[*place.element].toTensor() : result.toTensor();
    }
    for (const size_t value : call.last_uses) {
      values[value] = at::Tensor();
    }
  }
  for (const auto& [tensor, value] : left_behind_) {
    tensor.unsafeGetTensorImpl()->shallow_copy_from(values[value].getIntrusivePtr());
  }
  std::vector<at::Tensor> results;
  for (const size_t result : results_) {
    results.push_back(values[result]);
  }
  return results;
}

}  // namespace wakesleep
