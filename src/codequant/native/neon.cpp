// NEON with the dot product extension (Armv8.2 and later: Graviton 2, Apple M1, Snapdragon): one row to a register.
#include <arm_neon.h>
#include <sys/auxv.h>

#include "panel.h"

namespace codequant {
namespace {

struct Neon {
  static constexpr int lanes = 1;
  static constexpr int direct_tokens = 4, paired_tokens = 0, dense_tokens = 5, decode_once_above = 8;
  static constexpr bool tiles = false;
  using Bytes = uint8x16_t;
  using Sums = int32x4_t;
  static Bytes load(const uint8_t* p) { return vld1q_u8(p); }
  static void store(uint8_t* p, Bytes b) { vst1q_u8(p, b); }
  static Bytes broadcast(const uint8_t* p) { return vld1q_u8(p); }
  template <int n>
  static Bytes shift(Bytes b) {
    if constexpr (n > 0) return vshrq_n_u8(b, n);
    if constexpr (n < 0) return vshlq_n_u8(b, -n);
    return b;
  }
  static Bytes low4(Bytes b) { return vandq_u8(b, vdupq_n_u8(15)); }
  static Bytes low2(Bytes a, Bytes b) { return vbslq_u8(vdupq_n_u8(3), a, b); }
  static Bytes lookup(Bytes table, Bytes index) { return vqtbl1q_u8(table, index); }
  // sdot is signed times signed, and u may be 255: u = 2 * (u >> 1) + (u & 1).
  static Sums dot(Sums sum, Bytes u, Bytes s) {
    const int8x16_t weight = vreinterpretq_s8_u8(s), half = vreinterpretq_s8_u8(vshrq_n_u8(u, 1));
    sum = vdotq_s32(vdotq_s32(sum, half, weight), half, weight);
    return vdotq_s32(sum, vreinterpretq_s8_u8(vandq_u8(u, vdupq_n_u8(1))), weight);
  }
  static void reduce(const Sums (&s)[4], int32_t* out) {
    vst1q_s32(out, vpaddq_s32(vpaddq_s32(s[0], s[1]), vpaddq_s32(s[2], s[3])));
  }
};

bool supported() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }

}  // namespace

const Isa kNeon = make_isa<Neon>("neon", supported);

}  // namespace codequant
