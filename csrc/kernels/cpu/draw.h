// Random draws for CPU kernels. Philox generates sixteen blocks together. Then a distribution transforms the random
// words of the blocks.
//
// Intrinsics pay off only for Philox, which needs 64-bit products of 32-bit words. If the compiler vectorises Philox,
// the generated code uses more instructions to move the halves of these products than for the rest of a draw. With
// intrinsics, the products of sixteen words take five instructions with AVX-512, and ten with AVX2.
#pragma once

#include "../philox.h"
#include "tiles.h"

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // immintrin.h itself reads uninitialised vectors
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace wakesleep::cpu {

constexpr int kBlocksAtOnce = 16;

// Sixteen blocks, stored word by word. Philox replaces the counters with random words in place.
struct Blocks {
  alignas(64) uint32_t word[kPhiloxWords][kBlocksAtOnce];

  WAKESLEEP_INLINE Blocks(PhiloxKey key, PhiloxStream stream, uint64_t first_block) {
    const auto low = static_cast<uint32_t>(first_block), high = static_cast<uint32_t>(first_block >> 32);
#pragma omp simd
    for (int l = 0; l < kBlocksAtOnce; ++l) {
      const uint32_t block_low = low + static_cast<uint32_t>(l);
      const PhiloxBlock counter = philox_counter(key, stream, block_low, high + static_cast<uint32_t>(block_low < low));
      word[0][l] = counter.word[0];
      word[1][l] = counter.word[1];
      word[2][l] = counter.word[2];
      word[3][l] = counter.word[3];
    }
  }
};

struct PhiloxBaseline {
  static WAKESLEEP_INLINE void run(Blocks& blocks, uint64_t seed) {
    const PhiloxSchedule schedule(seed);
    auto& word = blocks.word;
#pragma omp simd
    for (int l = 0; l < kBlocksAtOnce; ++l) {
      const PhiloxBlock drawn = philox({{word[0][l], word[1][l], word[2][l], word[3][l]}}, schedule);
      word[0][l] = drawn.word[0];
      word[1][l] = drawn.word[1];
      word[2][l] = drawn.word[2];
      word[3][l] = drawn.word[3];
    }
  }
};

#if defined(__x86_64__)
struct PhiloxAvx512 {
  struct Product {
    __m512i high, low;
  };

  // Multiplies each word by the same multiplier: first the even words, then the odd words. Two shuffles then separate
  // the high and low halves of the products.
  __attribute__((target(WAKESLEEP_AVX512))) static inline Product multiply(__m512i words, __m512i multiplier) {
    const __m512i even = _mm512_mul_epu32(words, multiplier);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(words, 32), multiplier);
    return {_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB),
            _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA)};
  }

  __attribute__((target(WAKESLEEP_AVX512))) static inline void run(Blocks& blocks, uint64_t seed) {
    __m512i c0 = _mm512_load_si512(blocks.word[0]), c1 = _mm512_load_si512(blocks.word[1]);
    __m512i c2 = _mm512_load_si512(blocks.word[2]), c3 = _mm512_load_si512(blocks.word[3]);
    const __m512i m0 = _mm512_set1_epi64(kPhiloxMultiplier0), m1 = _mm512_set1_epi64(kPhiloxMultiplier1);
    auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const Product p0 = multiply(c0, m0), p1 = multiply(c2, m1);
      c0 = _mm512_xor_si512(_mm512_xor_si512(p1.high, c1), _mm512_set1_epi32(static_cast<int>(k0)));
      c2 = _mm512_xor_si512(_mm512_xor_si512(p0.high, c3), _mm512_set1_epi32(static_cast<int>(k1)));
      c1 = p1.low;
      c3 = p0.low;
      k0 += kPhiloxKeyStep0;
      k1 += kPhiloxKeyStep1;
    }
    _mm512_store_si512(blocks.word[0], c0);
    _mm512_store_si512(blocks.word[1], c1);
    _mm512_store_si512(blocks.word[2], c2);
    _mm512_store_si512(blocks.word[3], c3);
  }
};

struct PhiloxAvx2 {
  struct Product {
    __m256i high, low;
  };

  // Exchanges the two inner words in each half of a vector.
  __attribute__((target(WAKESLEEP_AVX2))) static inline void exchange(__m256i (&words)[2]) {
    words[0] = _mm256_shuffle_epi32(words[0], _MM_SHUFFLE(3, 1, 2, 0));
    words[1] = _mm256_shuffle_epi32(words[1], _MM_SHUFFLE(3, 1, 2, 0));
  }

  // Multiplies each word by the same multiplier. A third multiplication for the low halves saves the shuffles that
  // would gather them. One shuffle gathers the high halves of the even and the odd words, with the inner words
  // exchanged. Two exchanges cancel, so every round combines these with low halves in the same order: those of the
  // round before.
  __attribute__((target(WAKESLEEP_AVX2))) static inline Product multiply(__m256i words, __m256i multiplier) {
    const __m256 even = _mm256_castsi256_ps(_mm256_mul_epu32(words, multiplier));
    const __m256 odd = _mm256_castsi256_ps(_mm256_mul_epu32(_mm256_srli_epi64(words, 32), multiplier));
    return {_mm256_castps_si256(_mm256_shuffle_ps(even, odd, _MM_SHUFFLE(3, 1, 3, 1))),
            _mm256_mullo_epi32(words, multiplier)};
  }

  // Processes two vectors at a time, so that the multiplications of one hide the latency of the other.
  __attribute__((target(WAKESLEEP_AVX2))) static inline void run(Blocks& blocks, uint64_t seed) {
    const __m256i m0 = _mm256_set1_epi32(static_cast<int>(kPhiloxMultiplier0));
    const __m256i m1 = _mm256_set1_epi32(static_cast<int>(kPhiloxMultiplier1));
    __m256i c[kPhiloxWords][2];
    for (int word = 0; word < kPhiloxWords; ++word) {
      c[word][0] = _mm256_load_si256(reinterpret_cast<const __m256i*>(blocks.word[word]));
      c[word][1] = _mm256_load_si256(reinterpret_cast<const __m256i*>(blocks.word[word] + 8));
    }
    exchange(c[1]);  // the first round combines it with high halves
    auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const __m256i key0 = _mm256_set1_epi32(static_cast<int>(k0)), key1 = _mm256_set1_epi32(static_cast<int>(k1));
      for (int half = 0; half < 2; ++half) {
        const Product p0 = multiply(c[0][half], m0), p1 = multiply(c[2][half], m1);
        c[0][half] = _mm256_xor_si256(_mm256_xor_si256(p1.high, c[1][half]), key0);
        c[2][half] = _mm256_xor_si256(_mm256_xor_si256(p0.high, c[3][half]), key1);
        c[1][half] = p1.low;
        c[3][half] = p0.low;
      }
      k0 += kPhiloxKeyStep0;
      k1 += kPhiloxKeyStep1;
    }
    exchange(c[1]);  // the last round left the inner words of c[1] and c[3] exchanged
    exchange(c[3]);
    for (int word = 0; word < kPhiloxWords; ++word) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(blocks.word[word]), c[word][0]);
      _mm256_store_si256(reinterpret_cast<__m256i*>(blocks.word[word] + 8), c[word][1]);
    }
  }
};
#endif

// Writes the draws of `blocks` blocks, four per block, to `out`. The function processes sixteen blocks at a time, so it
// may write up to 60 more values.
template <typename Philox, typename Distribution, typename T>
WAKESLEEP_INLINE void fill_with(PhiloxKey key, uint64_t first_block, int64_t blocks, T* out) {
  for (int64_t done = 0; done < blocks; done += kBlocksAtOnce, out += kBlocksAtOnce * kPhiloxWords) {
    Blocks high(key, PhiloxStream::kHighWords, first_block + done);
    Philox::run(high, key.seed);
    Blocks low = high;
    if constexpr (kDrawsLowWords<T>) {
      low = Blocks(key, PhiloxStream::kLowWords, first_block + done);
      Philox::run(low, key.seed);
    }
    const auto& h = high.word;
    const auto& w = low.word;
#pragma omp simd
    for (int l = 0; l < kBlocksAtOnce; ++l) {
      const Draws<T> draws =
          Distribution::from(Words<T>{{{h[0][l], h[1][l], h[2][l], h[3][l]}}, {{w[0][l], w[1][l], w[2][l], w[3][l]}}});
      out[l * kPhiloxWords] = draws.value[0];
      out[l * kPhiloxWords + 1] = draws.value[1];
      out[l * kPhiloxWords + 2] = draws.value[2];
      out[l * kPhiloxWords + 3] = draws.value[3];
    }
  }
}

#if defined(__x86_64__)
template <typename Distribution, typename T>
WAKESLEEP_COMPILED_FOR(WAKESLEEP_AVX512)
void fill_avx512(PhiloxKey key, uint64_t first_block, int64_t blocks, T* out) {
  fill_with<PhiloxAvx512, Distribution>(key, first_block, blocks, out);
}

template <typename Distribution, typename T>
WAKESLEEP_COMPILED_FOR(WAKESLEEP_AVX2)
void fill_avx2(PhiloxKey key, uint64_t first_block, int64_t blocks, T* out) {
  fill_with<PhiloxAvx2, Distribution>(key, first_block, blocks, out);
}
#endif

template <typename Distribution, typename T>
void fill(PhiloxKey key, uint64_t first_block, int64_t blocks, T* out) {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::avx512) {
    return fill_avx512<Distribution>(key, first_block, blocks, out);
  }
  if (instruction_set() == InstructionSet::avx2) {
    return fill_avx2<Distribution>(key, first_block, blocks, out);
  }
#endif
  fill_with<PhiloxBaseline, Distribution>(key, first_block, blocks, out);
}

// The draws of `Distribution` for a tile of elements, which may begin in the middle of a block.
template <typename Distribution, typename T>
class DrawTile {
 public:
  // Returns the draws for the `count` elements that start at `first`. `count` is at most kTile.
  const T* fill(PhiloxKey key, int64_t first, int64_t count) {
    const int64_t blocks = (first % kPhiloxWords + count + kPhiloxWords - 1) / kPhiloxWords;
    cpu::fill<Distribution>(key, static_cast<uint64_t>(first) / kPhiloxWords, blocks, value_);
    return value_ + first % kPhiloxWords;
  }

 private:
  alignas(64) T value_[kTile + (kBlocksAtOnce + 1) * kPhiloxWords];
};

inline PhiloxKey read_key(const int64_t* key) { return {static_cast<uint64_t>(key[0]), static_cast<uint64_t>(key[1])}; }

}  // namespace wakesleep::cpu
