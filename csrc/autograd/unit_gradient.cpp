#include "unit_gradient.h"

#include <c10/core/StorageImpl.h>

#include <mutex>
#include <unordered_map>

namespace wakesleep::autograd {
namespace {

// The memory of a marked tensor. The weak reference keeps its address from being used for other memory.
struct Marked {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  at::ScalarType dtype;
  uint32_t version;
};

std::mutex mutex;
std::unordered_map<const c10::StorageImpl*, Marked>& marked() {
  static auto* all = new std::unordered_map<const c10::StorageImpl*, Marked>;  // outlives every tensor
  return *all;
}

uint32_t version_of(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->version_counter().current_version();
}

}  // namespace

void mark_unit_gradient(const at::Tensor& ones) {
  const auto storage = ones.storage().getWeakStorageImpl();
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto entry = marked().begin(); entry != marked().end();) {
    entry = entry->second.storage.expired() ? marked().erase(entry) : std::next(entry);
  }
  marked().insert_or_assign(ones.storage().unsafeGetStorageImpl(),
                            Marked{storage, ones.scalar_type(), version_of(ones)});
}

bool is_unit_gradient(const at::Tensor& tensor) {
  if (!tensor.has_storage() || tensor.is_inference() || tensor.is_neg()) {
    return false;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = marked().find(tensor.storage().unsafeGetStorageImpl());
  return found != marked().end() && found->second.dtype == tensor.scalar_type() &&
         found->second.version == version_of(tensor);
}

}  // namespace wakesleep::autograd
