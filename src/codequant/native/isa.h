// What one instruction set offers: a table of functions, filled in by panel.h for the sources that name their
// instructions (portable.cpp, avx2.cpp, ...), and chosen once in dispatch.cpp.
#pragma once

#include <cstdint>

#include "layout.h"

#define CODEQUANT_API extern "C" __attribute__((visibility("default")))

namespace codequant {

// One plane of a quantized token: its value at column i is middle + step * (level[i] - zero). Counting from the middle
// of the range and not from its low end keeps the float terms small: the sum with the zero point is of integers.
//
// 4 and 8 activation bits take one plane. 16 bits, "not quantized", take the token as a 24-bit integer in three planes
// of 8 bits, most significant first, of which only the first has a middle and a zero: the same integer kernels then
// give a product as exact as a float32 one, whatever the instruction set. (Measured against vdpbf16ps on Sapphire
// Rapids, three vpdpbusd are also the faster way: 6.6 / 3 against 1.7 G instructions/s, of twice the width.)
struct Token {
  const uint8_t* level;  // [groups * padded columns], 0 in the padding
  float step;
  float middle;
  int32_t zero;
};

constexpr int kMaxPlanes = 3;
inline int planes(int64_t activation_bits) { return activation_bits == 16 ? kMaxPlanes : 1; }

// A panel (layout.h) to be multiplied with tokens, and where the products go.
struct Panel {
  const uint8_t* data;
  float (*out)[kRows];
};

constexpr int64_t kWidth = 2;        // panels of one product
constexpr int64_t kMaxTokens = 256;  // token planes of one product

enum class Activation : int64_t { silu, gelu, gelu_tanh, relu };

enum class Dtype : int64_t { float32, bfloat16, float16, int64, int32 };
inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::int64 ? 8 : dtype == Dtype::float32 || dtype == Dtype::int32 ? 4 : 2;
}

// One Kronecker factor of codequant.hadamard's H_n.
struct Factor {
  int64_t order;
  const float* matrix;  // [order, order rounded up to kRows], padded with 0; null: Sylvester's, of a power of two
};

// x @ H_n; the same as no transform at all where it has no factors. kernels/cpu.py makes it.
struct Transform {
  const Factor* factors;  // [count]; their orders' product is n
  int64_t count;
  float scale;  // of the factors' product
};

struct Isa {
  const char* name;
  bool (*supported)();
  bool tiles;  // the tokens of one `product` must be evenly spaced in memory, with tile_slack() bytes after the last

  // x [matrices.columns] -> planes(bits) tokens; `level` has room for planes(bits) * matrices.level_bytes() bytes.
  // reference.quantize_activation, integer for integer. A token that is not finite becomes NaN as a whole.
  void (*quantize)(const Matrices& matrices, const float* x, int64_t bits, float clip, uint8_t* level, Token* tokens);

  // out[t][row] of each panel = sum over its columns, for count <= kMaxTokens tokens. width: 1 panel or kWidth, which
  // are read side by side: memory delivers two streams faster than one. `scratch` has kScratch bytes.
  void (*product)(const Matrices& matrices, const Panel* panels, int64_t width, const Token* tokens, int64_t count,
                  uint8_t* scratch);

  // gate[i] = activation(gate[i]) * up[i], or without the product where up is null.
  void (*activate)(Activation activation, float* gate, const float* up, int64_t count);

  // x [columns] -> its transform, somewhere in scratch [2 * columns].
  const float* (*transform)(const Transform& transform, const float* x, int64_t columns, float* scratch);

  // The innermost loop of `product` for many tokens, on operands in the first cache. Returns the operations done.
  int64_t (*micro_kernel)(int64_t repeats);

  // From a floating-point dtype to float32, and back, rounded half to even.
  void (*widen)(Dtype dtype, const void* x, int64_t count, float* out);
  void (*narrow)(Dtype dtype, const float* x, int64_t count, void* out);
};

constexpr int64_t kScratch = kSegment * kRows;

// Token planes to multiply with panel after panel: their levels, of 1.25 MiB at most, stay in the second cache.
ALWAYS_INLINE inline int64_t most_tokens(const Matrices& matrices) {
  const int64_t fit = (5 << 18) / matrices.level_bytes() / 32 * 32;  // whole tiles
  return fit < 32 ? 32 : fit < kMaxTokens ? fit : kMaxTokens;
}

// Readable bytes after the last token's levels: tiles take 16 tokens of 64 columns at a time.
ALWAYS_INLINE inline int64_t tile_slack(const Matrices& matrices) { return 15 * matrices.level_bytes() + 64; }

extern const Isa kPortable, kAvx2, kAvxVnni, kAvx512Vnni, kAmx, kNeon;

const Isa& isa();  // the chosen one

}  // namespace codequant
