// Between the dtypes of the caller's tensors and float32, in which everything is computed. Plain loops and integer
// arithmetic: the compiler vectorizes them for the instruction set of the source that includes this, and the bits are
// the same on all of them.
#pragma once

#include <cstring>

#include "isa.h"

namespace codequant {
namespace {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float from_bfloat16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

// A half is 2**112 times the float that has its bits 13 places further left, subnormal or not.
inline float from_float16(uint16_t x) {
  const uint32_t magnitude = (x & 0x7fffu) << 13, sign = (x & 0x8000u) << 16;
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  return float_of((magnitude < 0x0f800000 ? finite : finite | 0x7f800000) | sign);
}

inline uint16_t to_float16(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // whose last place is a half's
  uint32_t rounded = magnitude < 0x38800000 ? subnormal : normal;                 // below 2**-14
  rounded = magnitude < 0x47800000 ? rounded : 0x7c00;                            // from 2**16 on
  return static_cast<uint16_t>((x != x ? 0x7e00 : rounded) | (bits >> 16 & 0x8000));
}

template <float (*f)(uint16_t)>
void widen_each(const void* x, int64_t count, float* out) {
  const uint16_t* from = static_cast<const uint16_t*>(x);
  for (int64_t i = 0; i < count; ++i) out[i] = f(from[i]);
}

template <uint16_t (*f)(float)>
void narrow_each(const float* x, int64_t count, void* out) {
  uint16_t* to = static_cast<uint16_t*>(out);
  for (int64_t i = 0; i < count; ++i) to[i] = f(x[i]);
}

void widen(Dtype dtype, const void* x, int64_t count, float* out) {
  if (dtype == Dtype::bfloat16) return widen_each<from_bfloat16>(x, count, out);
  if (dtype == Dtype::float16) return widen_each<from_float16>(x, count, out);
  std::memcpy(out, x, static_cast<size_t>(count) * sizeof *out);
}

void narrow(Dtype dtype, const float* x, int64_t count, void* out) {
  if (dtype == Dtype::bfloat16) return narrow_each<to_bfloat16>(x, count, out);
  if (dtype == Dtype::float16) return narrow_each<to_float16>(x, count, out);
  std::memcpy(out, x, static_cast<size_t>(count) * sizeof *x);
}

}  // namespace
}  // namespace codequant
