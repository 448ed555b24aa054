// Numbers that change how ops compute, but not what. An environment variable chooses each of them. Tests and
// comparisons set them within a process.
#pragma once

#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <optional>
#include <string>

namespace wakesleep {

class Setting {
 public:
  constexpr explicit Setting(const char* variable) : variable_(variable) {}

  // Returns the number that was set or, if none was, that of the environment variable, which is read once.
  std::optional<int64_t> get() {
    int64_t number = number_.load(std::memory_order_relaxed);
    if (number == kUnread) {
      number = in_environment();
      number_.store(number, std::memory_order_relaxed);
    }
    return number == kNone ? std::nullopt : std::optional(number);
  }

  // Sets the number. std::nullopt restores that of the environment variable.
  void set(std::optional<int64_t> number) {
    check(number.value_or(0) >= 0, number.value_or(0));
    number_.store(number.value_or(kUnread), std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t kUnread = -2, kNone = -1;

  const char* variable_;
  std::atomic<int64_t> number_ = kUnread;

  template <typename Got>
  void check(bool is_valid, const Got& got) const {
    TORCH_CHECK_VALUE(is_valid, "expected ", variable_, " to be a number of at least 0, got ", got);
  }

  int64_t in_environment() const {
    const char* chosen = std::getenv(variable_);
    if (chosen == nullptr) {
      return kNone;
    }
    char* end = nullptr;
    const int64_t number = std::strtoll(chosen, &end, 10);
    check(end != chosen && *end == '\0' && number >= 0, std::string("'") + chosen + "'");
    return number;
  }
};

namespace settings {

inline Setting small_batch("WAKESLEEP_SMALL_BATCH");            // the largest batch for our GEMM kernels, in rows
inline Setting chunk_mib("WAKESLEEP_CHUNK_MIB");                // the size of a chunk of rows
inline Setting dependent_launch("WAKESLEEP_DEPENDENT_LAUNCH");  // 0: kernels wait until the previous one has completed

}  // namespace settings
}  // namespace wakesleep
