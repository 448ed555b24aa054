// Counter-based random numbers. Every draw is a function of a key and the index of an element.
//
// Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), checked
// against the known-answer vectors published with Random123. This comment is the definition of the layout:
//
//   key      = seed (64 bits)
//   counter  = element / 4 (64 bits), followed by the offset (60 bits) and the stream (top 4 bits)
//   element i uses word i % 4 of its block.
//
// The words do not depend on threads, grid, chunk or vector width, so every order of evaluation draws the same words. A
// float64 draw takes its upper 32 bits from the stream of the float32 draw, and its lower 32 bits from a second stream.
// So the same key gives the same draw at either precision, up to rounding.
//
// On CUDA, the framework's generator uses the same cipher with the same seed. Its counter holds a thread index in the
// bits that we use for the offset and the stream. A thread index never reaches the top 4 bits, and our stream is never
// 0. So the two never use the same block.
#pragma once

#include "elementary.h"

namespace wakesleep {

constexpr int kPhiloxWords = 4;  // words in a block

struct PhiloxBlock {
  uint32_t word[kPhiloxWords];
};

struct PhiloxKey {
  uint64_t seed;
  uint64_t offset;
};

enum class PhiloxStream : uint32_t { kHighWords = 1, kLowWords = 2 };

// Returns the counter of the block that holds elements 4*block .. 4*block+3.
WAKESLEEP_FUNCTION PhiloxBlock philox_counter(PhiloxKey key, PhiloxStream stream, uint32_t block_low,
                                              uint32_t block_high) {
  const uint32_t top = (uint32_t(key.offset >> 32) & 0x0FFFFFFF) | (uint32_t(stream) << 28);
  return {{block_low, block_high, uint32_t(key.offset), top}};
}

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53, kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9, kPhiloxKeyStep1 = 0xBB67AE85;

// The keys of the ten rounds. They depend on the seed alone, so a thread computes them once for all its blocks.
struct PhiloxSchedule {
  uint32_t word[kPhiloxRounds][2];

  WAKESLEEP_FUNCTION explicit PhiloxSchedule(uint64_t seed) {
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      word[round][0] = uint32_t(seed) + round * kPhiloxKeyStep0;
      word[round][1] = uint32_t(seed >> 32) + round * kPhiloxKeyStep1;
    }
  }
};

WAKESLEEP_FUNCTION PhiloxBlock philox(PhiloxBlock counter, const PhiloxSchedule& schedule) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = uint64_t(kPhiloxMultiplier0) * c0;
    const uint64_t product1 = uint64_t(kPhiloxMultiplier1) * c2;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ schedule.word[round][0];
    c1 = uint32_t(product1);
    c2 = uint32_t(product0 >> 32) ^ c3 ^ schedule.word[round][1];
    c3 = uint32_t(product0);
  }
  return {{c0, c1, c2, c3}};
}

// The random words of a block for draws of type T. The low words are generated for float64 only.
template <typename T>
struct Words {
  PhiloxBlock high;
  PhiloxBlock low;
};

template <typename T>
constexpr bool kDrawsLowWords = sizeof(T) > sizeof(float);

// A key with its schedule.
struct ScheduledKey {
  PhiloxKey key;
  PhiloxSchedule schedule;
};

template <typename T>
WAKESLEEP_FUNCTION Words<T> draw_words(const ScheduledKey& of, uint32_t block_low, uint32_t block_high) {
  Words<T> words = {philox(philox_counter(of.key, PhiloxStream::kHighWords, block_low, block_high), of.schedule), {}};
  if constexpr (kDrawsLowWords<T>) {
    words.low = philox(philox_counter(of.key, PhiloxStream::kLowWords, block_low, block_high), of.schedule);
  }
  return words;
}

// Returns a uniform number in (0, 1] from word w. It is (n + 1/2) / 2^bits, rounded, where n is the word as an unsigned
// integer of 32 bits, or 64 bits for float64.
template <typename T>
WAKESLEEP_FUNCTION T uniform(const Words<T>& words, int w) {
  if constexpr (!kDrawsLowWords<T>) {
    return float(words.high.word[w]) * 0x1p-32f + 0x1p-33f;
  } else {
    return double(words.high.word[w]) * 0x1p-32 + (double(words.low.word[w]) * 0x1p-64 + 0x1p-65);
  }
}

// Returns word w as an angle in units of 2^-bits full turns (see cos_sin_of_turn).
template <typename T>
WAKESLEEP_FUNCTION typename Format<T>::Int turn(const Words<T>& words, int w) {
  if constexpr (!kDrawsLowWords<T>) {
    return int32_t(words.high.word[w]);
  } else {
    return int64_t((uint64_t(words.high.word[w]) << 32) | words.low.word[w]);
  }
}

// Returns two independent standard normals from words w and w + 1 (Box and Muller 1958).
template <typename T>
WAKESLEEP_FUNCTION Pair<T> normals(const Words<T>& words, int w) {
  const T radius = square_root(T(-2) * log_of_normal(uniform(words, w)));
  const Pair<T> direction = cos_sin_of_turn<T>(turn(words, w + 1));
  return {radius * direction.first, radius * direction.second};
}

// One draw for each of the four elements of a block.
template <typename T>
struct Draws {
  T value[kPhiloxWords];
};

struct StandardNormals {
  template <typename T>
  static WAKESLEEP_FUNCTION Draws<T> from(const Words<T>& words) {
    const Pair<T> a = normals(words, 0);
    const Pair<T> b = normals(words, 2);
    return {{a.first, a.second, b.first, b.second}};
  }
};

// Standard normals for results of 16 bits (see log_of_uniform_approx and cos_sin_of_turn_approx). If a pair lies at
// distance r from the origin, the error of a normal is at most 2^-17 of itself plus 2^-19.5 r, and r is less than 6.8.
struct ApproximateNormals {
  static WAKESLEEP_FUNCTION Pair<float> pair(const Words<float>& words, int w) {
    const float radius = square_root(-2.0f * log_of_uniform_approx(uniform(words, w)));
    const Pair<float> direction = cos_sin_of_turn_approx(turn(words, w + 1));
    return {radius * direction.first, radius * direction.second};
  }

  static WAKESLEEP_FUNCTION Draws<float> from(const Words<float>& words) {
    const Pair<float> a = pair(words, 0);
    const Pair<float> b = pair(words, 2);
    return {{a.first, a.second, b.first, b.second}};
  }
};

struct Uniforms {
  template <typename T>
  static WAKESLEEP_FUNCTION Draws<T> from(const Words<T>& words) {
    return {{uniform(words, 0), uniform(words, 1), uniform(words, 2), uniform(words, 3)}};
  }
};

}  // namespace wakesleep
