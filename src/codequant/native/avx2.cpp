// AVX2 without VNNI (Haswell to Skylake, Zen 1 to 3).
#include "avx2.h"

namespace codequant {
namespace {

struct Avx2 : Avx2Base {
  // vpmaddubsw adds pairs in 16 bits and saturates at 2 * 255 * 127: multiply the level's nibbles apart.
  static Sums dot(Sums sum, Bytes u, Bytes s) {
    const __m256i low = _mm256_maddubs_epi16(low4(u), s);
    const __m256i high = _mm256_maddubs_epi16(low4(shift<4>(u)), s);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
  }
};

}  // namespace

const Isa kAvx2 = make_isa<Avx2>("avx2", [] { return __builtin_cpu_supports("avx2") != 0; });

}  // namespace codequant
