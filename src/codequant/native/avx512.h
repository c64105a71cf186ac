// What the two AVX-512 sources share: four rows to a register.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)  // gcc's own AVX-512 header trips over these
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include "panel.h"

namespace codequant {
namespace {

struct Avx512Vnni {
  static constexpr int lanes = 4;
  static constexpr int direct_tokens = 6, paired_tokens = 4, dense_tokens = 6, decode_once_above = 12;
  static constexpr bool tiles = false;
  using Bytes = __m512i;
  using Sums = __m512i;
  static Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint8_t* p, Bytes b) { _mm512_storeu_si512(p, b); }
  static Bytes broadcast(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <int n>
  static Bytes shift(Bytes b) {
    if constexpr (n > 0) return _mm512_srli_epi16(b, n);
    if constexpr (n < 0) return _mm512_slli_epi16(b, -n);
    return b;
  }
  static Bytes low4(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
  static Bytes low2(Bytes a, Bytes b) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(3), a, b, 0xCA);  // mask ? a : b
  }
  static Bytes lookup(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }
  // Not the intrinsic: gcc 12 moves and spills the sums around it, at half the speed.
  static Sums dot(Sums sum, Bytes u, Bytes s) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
    return sum;
  }
  static void reduce(const Sums (&s)[4], int32_t* out) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(s[0], s[1]), _mm512_unpackhi_epi32(s[0], s[1]));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(s[2], s[3]), _mm512_unpackhi_epi32(s[2], s[3]));
    _mm512_storeu_si512(out, _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd)));
  }
};

bool has_avx512_vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace
}  // namespace codequant
