// What the two AVX2 sources share: two rows to a register. They differ in `dot`.
#pragma once

#include <immintrin.h>

#include "panel.h"

namespace codequant {
namespace {

struct Avx2Base {
  static constexpr int lanes = 2;
  static constexpr int direct_tokens = 2, paired_tokens = 0, dense_tokens = 2, decode_once_above = 4;  // 16 registers
  static constexpr bool tiles = false;
  using Bytes = __m256i;
  using Sums = __m256i;
  static Bytes load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(uint8_t* p, Bytes b) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), b); }
  static Bytes broadcast(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <int n>
  static Bytes shift(Bytes b) {
    if constexpr (n > 0) return _mm256_srli_epi16(b, n);
    if constexpr (n < 0) return _mm256_slli_epi16(b, -n);
    return b;
  }
  static Bytes low4(Bytes b) { return _mm256_and_si256(b, _mm256_set1_epi8(15)); }
  static Bytes low2(Bytes a, Bytes b) {
    const Bytes mask = _mm256_set1_epi8(3);
    return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
  }
  static Bytes lookup(Bytes table, Bytes index) { return _mm256_shuffle_epi8(table, index); }
  static void reduce(const Sums (&s)[4], int32_t* out) {
    const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(s[0], s[1]), _mm256_unpackhi_epi32(s[0], s[1]));
    const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(s[2], s[3]), _mm256_unpackhi_epi32(s[2], s[3]));
    const __m256i rows = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), rows);
  }
};

}  // namespace
}  // namespace codequant
