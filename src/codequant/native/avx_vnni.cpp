// AVX2 with AVX-VNNI (Alder Lake and later without AVX-512).
#include <cpuid.h>

#include "avx2.h"

namespace codequant {
namespace {

struct AvxVnni : Avx2Base {
  static Sums dot(Sums sum, Bytes u, Bytes s) { return _mm256_dpbusd_avx_epi32(sum, u, s); }
};

bool supported() {  // gcc and clang disagree on the name that __builtin_cpu_supports takes
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

}  // namespace

const Isa kAvxVnni = make_isa<AvxVnni>("avx_vnni", supported);

}  // namespace codequant
