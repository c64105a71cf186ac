// The kernels, written once over a vector type V that a source per instruction set supplies:
//
//     lanes                                16-byte lanes of a register: 1, 2 or 4
//     direct_tokens, dense_tokens          tokens whose sums fit in the registers, decoding on the fly and not
//     paired_tokens                        tokens for which two panels are read side by side; 0 where that never pays
//     decode_once_above                    tokens from which a panel is decoded once, to scratch
//     tiles                                whether decoded panels are multiplied by tiles: see amx.cpp
//     Bytes, Sums                          registers of bytes and of int32 sums
//     load(p), broadcast(p)                a register; one lane repeated
//     shift<n>(v)                          every 16 bits right by n (left by -n)
//     low4(v), low2(v, w)                  v & 15; bits 0-1 of v and the others of w
//     lookup(table, index)                 per lane, index < 16
//     dot(sum, u, s)                       sum += u8 * s8, over groups of four bytes
//     reduce(sums[4], out)                 the sums of each lane, out[4 * lane + register]
//
// All sums of products are integers, and the float operations that follow come in one order without contraction
// (-ffp-contract=off): the result of a token does not depend on the instruction set, on the threads, or on the other
// tokens of the batch.
//
// Everything here has internal linkage or is always inlined, and nothing inline of the standard library is called: of
// an inline function in several sources the linker keeps one copy, perhaps with instructions this processor lacks.
#pragma once

#include <cstring>
#include <utility>

#include "convert.h"
#include "hadamard.h"
#include "isa.h"

namespace codequant {
namespace {

template <class F, int... I>
ALWAYS_INLINE inline void repeat_each(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

// f(0), ..., f(N - 1) with constants, so that arrays of registers stay in registers.
template <int N, class F>
ALWAYS_INLINE inline void repeat(F f) {
  repeat_each(f, std::make_integer_sequence<int, N>{});
}

constexpr int64_t kRegister = 4 * kStep;  // bytes of the four lanes i % 4 == constant
constexpr int64_t kLine = 64;             // bytes of a cache line
// How far ahead to fetch weights into the second and into the first cache, in bytes. Both together let two panels side
// by side stream at 90% of a plain read on Sapphire Rapids; 4096 is 3% slower, and either cache alone 5 to 25%.
constexpr int64_t kFar = 3072, kNear = 768;
constexpr int64_t kPause = 512;  // bytes to fetch beyond that at the end of a panel, while what follows has no loads

// Up to kSegment columns of one group of a panel. Bounded so that the decoded segment (32 KiB) stays in the first
// cache and no int32 overflows: 2048 * 255 * 127 < 2**26, and 128 * row_sum < 2**30 for groups of 2**16 columns.
struct Segment {
  const uint8_t* header;
  const uint8_t* data;
  int64_t chunks;
  int64_t column;  // of the first level
  bool first_of_group, first_of_panel;
  float (*out)[kRows];
};

// The compiler's own vectors, for loops so short that gcc would unroll them into scalars.
template <int count>
struct Vectors;
template <>
struct Vectors<4> {
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
};
template <>
struct Vectors<8> {
  typedef float Floats __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
};
template <>
struct Vectors<16> {
  typedef float Floats __attribute__((vector_size(64)));
  typedef int32_t Ints __attribute__((vector_size(64)));
};

// Steps and row sums of `count` rows of a segment, from row `first` on.
template <int count>
struct Scales {
  using Floats = typename Vectors<count>::Floats;
  using Ints = typename Vectors<count>::Ints;
  Floats step;
  Ints row_sum;
  bool add;

  ALWAYS_INLINE Scales(const Segment& segment, int first) : add(!segment.first_of_panel) {
    std::memcpy(&step, segment.header + kTable + first * 4, sizeof step);
    std::memcpy(&row_sum, segment.header + kTable + kRows * 4 + first * 4, sizeof row_sum);
    if (!segment.first_of_group) row_sum = Ints{};  // they count once
  }

  // Adds one segment's integer sums to a token's output, which starts at 0.
  ALWAYS_INLINE void finish(const Token& token, const int32_t* dot, float* out) const {
    Ints sum;
    Floats total{};
    std::memcpy(&sum, dot, sizeof sum);
    if (add) std::memcpy(&total, out, sizeof total);
    sum -= token.zero * row_sum;
    total += step * (token.step * __builtin_convertvector(sum, Floats) +
                     token.middle * __builtin_convertvector(row_sum, Floats));
    std::memcpy(out, &total, sizeof total);
  }
};

// The same from the registers of one part: 4 * V::lanes rows of the N tokens from `first` on.
template <class V, int N>
ALWAYS_INLINE inline void finish_part(const Segment& segment, const Token* tokens, int64_t first,
                                      const typename V::Sums (&sums)[N][4], int part) {
  constexpr int count = 4 * V::lanes;
  const Scales<count> rows(segment, part * count);
  repeat<N>([&](auto n) ALWAYS_INLINE {
    int32_t dot[count];
    V::reduce(sums[n], dot);
    rows.finish(tokens[first + n], dot, segment.out[first + n] + part * count);
  });
}

// The indices of step s of register g, from the low (and for 3 bits high) bytes of a chunk. Only bits 0-3 count; where
// a codebook has fewer than 16 entries the upper ones of these are arbitrary, as the table repeats.
template <class V, int bits, int s, int g>
ALWAYS_INLINE inline typename V::Bytes index(typename V::Bytes low, typename V::Bytes high) {
  if constexpr (bits == 4) return V::low4(V::template shift<4 * s>(low));
  if constexpr (bits == 2) return V::low4(V::template shift<2 * s>(low));
  if constexpr (bits == 3) {
    constexpr int bit = g % 2 * 4 + s;
    return V::low4(V::low2(V::template shift<2 * s>(low), V::template shift<bit - 2>(high)));
  }
}

// One chunk's registers: visit(s, weights[4]) for every step s in order. `data` points at the first lane to load.
template <class V, int bits, class F>
ALWAYS_INLINE inline void decode_chunk(const typename V::Bytes (&table)[4], const uint8_t* data, F visit) {
  typename V::Bytes low[4], high[2] = {};
  repeat<4>([&](auto g) ALWAYS_INLINE { low[g] = V::load(data + g * kRegister); });
  if constexpr (bits == 3) {
    repeat<2>([&](auto i) ALWAYS_INLINE { high[i] = V::load(data + (4 + i) * kRegister); });
  }
  repeat<(bits == 4 ? 2 : 4)>([&](auto s) ALWAYS_INLINE {
    typename V::Bytes weights[4];
    repeat<4>([&](auto g) ALWAYS_INLINE {
      weights[g] = V::lookup(table[g], index<V, bits, s, g>(low[g], high[g / 2]));
    });
    visit(s, weights);
  });
}

template <int64_t bytes, bool far>
ALWAYS_INLINE inline void prefetch(const uint8_t* data) {
  for (int64_t i = 0; i < bytes; i += kLine) {
    if constexpr (far) __builtin_prefetch(data + kFar + i, 0, 2);
    __builtin_prefetch(data + kNear + i, 0, 3);
  }
}

template <class V>
ALWAYS_INLINE inline void load_tables(const uint8_t* header, typename V::Bytes (&table)[4]) {
  repeat<4>([&](auto g) ALWAYS_INLINE { table[g] = V::load(header + g * kRegister); });
}

template <class V, int N>
ALWAYS_INLINE inline void accumulate(typename V::Sums (&sums)[N][4], const typename V::Bytes (&weights)[4],
                                     const uint8_t* const (&level)[N], int64_t column) {
  repeat<N>([&](auto n) ALWAYS_INLINE {
    const typename V::Bytes x = V::broadcast(level[n] + column);
    repeat<4>([&](auto g) ALWAYS_INLINE { sums[n][g] = V::dot(sums[n][g], x, weights[g]); });
  });
}

// The N tokens from `first` on times P segments side by side, looking the weights up on the way.
template <class V, int bits, int N, int P>
void direct(const Segment* segments, const Token* tokens, int64_t first) {
  constexpr int64_t chunk = bits == 4 ? 32 : 64, chunk_bytes = chunk * kRows * bits / 8;
  const uint8_t* level[N];
  repeat<N>([&](auto n) ALWAYS_INLINE { level[n] = tokens[first + n].level + segments[0].column; });
  for (int part = 0; part < 4 / V::lanes; ++part) {  // a register holds V::lanes of the four lanes
    typename V::Bytes table[P][4];
    typename V::Sums sums[P][N][4] = {};
    const uint8_t* data[P];
    repeat<P>([&](auto p) ALWAYS_INLINE {
      prefetch<kHeader, true>(segments[p].header);  // chunks fetch chunks, and the next header lies between them
      load_tables<V>(segments[p].header + part * V::lanes * kStep, table[p]);
      data[p] = segments[p].data + part * V::lanes * kStep;
    });
    for (int64_t column = 0; column < segments[0].chunks * chunk; column += chunk) {
      repeat<P>([&](auto p) ALWAYS_INLINE {
        prefetch<chunk_bytes, true>(data[p]);
        decode_chunk<V, bits>(table[p], data[p], [&](auto s, const typename V::Bytes(&weights)[4]) ALWAYS_INLINE {
          accumulate<V, N>(sums[p], weights, level, column + s * kStep);
        });
        data[p] += chunk_bytes;
      });
    }
    repeat<P>([&](auto p) ALWAYS_INLINE {
      for (int64_t i = 0; i < kPause; i += kLine) __builtin_prefetch(data[p] + kFar + i, 0, 2);
    });
    repeat<P>([&](auto p) ALWAYS_INLINE { finish_part<V, N>(segments[p], tokens, first, sums[p], part); });
  }
}

// Looks a segment up into scratch: kTable bytes per step, in the order of the tables, or in that of tiles.
template <class V, int bits>
void decode(const Segment& segment, uint8_t* scratch) {
  constexpr int64_t chunk = bits == 4 ? 32 : 64, chunk_bytes = chunk * kRows * bits / 8;
  for (int part = 0; part < 4 / V::lanes; ++part) {
    const int64_t offset = part * V::lanes * kStep;
    typename V::Bytes table[4];
    load_tables<V>(segment.header + offset, table);
    const uint8_t* data = segment.data + offset;
    uint8_t* decoded = scratch + offset;
    for (int64_t c = 0; c < segment.chunks; ++c, data += chunk_bytes, decoded += chunk * kRows) {
      decode_chunk<V, bits>(table, data, [&](auto s, const typename V::Bytes(&weights)[4]) ALWAYS_INLINE {
        repeat<4>([&](auto g) ALWAYS_INLINE { V::store(decoded + s * kTable + g * kRegister, weights[g]); });
      });
    }
  }
}

// Columns of a tile of weights, its bytes, and as many tiles of one panel as the first cache holds beside those of
// another one and the levels that they meet.
constexpr int64_t kTile = 64, kTileBytes = kTile * kRows, kBlockTiles = 8, kBlock = kBlockTiles * kTileBytes;

// Looks one chunk of a segment up, in the order of tiles; nothing past the last.
template <class V, int bits>
ALWAYS_INLINE inline void decode_for_tiles(const Segment& segment, int64_t index, uint8_t* decoded) {
  constexpr int64_t chunk = bits == 4 ? 32 : 64, chunk_bytes = chunk * kRows * bits / 8;
  if (index >= segment.chunks) {
    std::memset(decoded, 0, chunk * kRows);
    return;
  }
  const uint8_t* data = segment.data + index * chunk_bytes;
  typename V::Bytes table[4];
  load_tables<V>(segment.header, table);
  prefetch<chunk_bytes, true>(data);
  decode_chunk<V, bits>(table, data, [&](auto s, const typename V::Bytes(&weights)[4]) ALWAYS_INLINE {
    V::store_step(decoded + s * kTable, weights);
  });
}

// The N tokens from `first` on times one decoded segment. On the way the memory from `ahead` on is fetched, `pace` bytes
// a step, so that it is at work while the arithmetic is.
template <class V, int N>
void dense(const Segment& segment, const uint8_t* scratch, int64_t columns, const uint8_t* ahead, int64_t pace,
           const Token* tokens, int64_t first) {
  const uint8_t* level[N];
  repeat<N>([&](auto n) ALWAYS_INLINE { level[n] = tokens[first + n].level + segment.column; });
  for (int part = 0; part < 4 / V::lanes; ++part) {
    typename V::Sums sums[N][4] = {};
    const uint8_t* data = scratch + part * V::lanes * kStep;
    for (int64_t column = 0; column < columns; column += kStep, data += kTable, ahead += pace) {
      __builtin_prefetch(ahead, 0, 2);
      typename V::Bytes weights[4];
      repeat<4>([&](auto g) ALWAYS_INLINE { weights[g] = V::load(data + g * kRegister); });
      accumulate<V, N>(sums, weights, level, column);
    }
    finish_part<V, N>(segment, tokens, first, sums, part);
  }
}

// All tokens times one or two segments, by tiles. Up to two passes over the weights decode them on the way, a tile of
// columns ahead: other units of the core look up while the tiles multiply. With more passes that gains nothing, and a
// block of columns is decoded before them; while the first one multiplies, the next block is fetched, which follows in
// memory. A block stays in the first cache, where a tile of levels fetched from the second one meets two of weights.
template <class V, int bits>
void dense_tiles(const Segment* segments, int64_t width, const Token* tokens, int64_t count, uint8_t* scratch) {
  constexpr int64_t chunk = bits == 4 ? 32 : 64, tile_chunks = kTile / chunk, pair = V::tile_tokens;
  constexpr int64_t half_bytes = kTileBytes * bits / 16;  // of half a tile, not decoded
  const typename V::Session session;
  const int64_t stride = count > 1 ? tokens[1].level - tokens[0].level : 0;
  const int64_t tiles = ceil_div(segments[0].chunks, tile_chunks);
  const int64_t block = count > pair ? kBlockTiles : tiles, ahead = count > 2 * pair ? kBlockTiles : 1;
  alignas(64) int32_t dot[kMaxTokens / pair][2][pair][kRows];
  for (int64_t start = 0; start < tiles; start += block) {
    const int64_t end = start + block < tiles ? start + block : tiles;
    // Both for one half of a panel's tile of columns.
    const auto decode = [&](int64_t tile, int64_t p, int64_t half) ALWAYS_INLINE {
      if (tile >= end || p >= width || half >= tile_chunks) return;
      uint8_t* decoded = scratch + p * kBlock + tile % kBlockTiles * kTileBytes + half * chunk * kRows;
      decode_for_tiles<V, bits>(segments[p], tile * tile_chunks + half, decoded);
    };
    const auto fetch = [&](int64_t tile, int64_t p, int64_t half) ALWAYS_INLINE {
      if (p >= width) return;
      const uint8_t* data = segments[p].data + (2 * tile + half) * half_bytes;
      for (int64_t i = 0; i < half_bytes; i += kLine) __builtin_prefetch(data + i, 0, 2);
    };
    for (int64_t tile = start; tile < start + ahead; ++tile) {
      for (int64_t part = 0; part < 4; ++part) decode(tile, part / 2, part % 2);
    }
    for (int64_t first = 0; first < count; first += pair) {
      const auto meanwhile = [&](int64_t tile, int64_t p, int64_t half) ALWAYS_INLINE {
        if (first > 0) return;
        if (ahead == 1) {
          decode(tile + 1, p, half);
        } else {
          fetch(tile + ahead, p, half);
        }
      };
      V::multiply(scratch, width == 2, start, end, tokens[first].level + segments[0].column, stride,
                  count - first > pair / 2, start == 0, dot[first / pair], meanwhile);
    }
  }
  for (int64_t p = 0; p < width; ++p) {
    const Scales<kRows> rows(segments[p], 0);
    for (int64_t t = 0; t < count; ++t) rows.finish(tokens[t], dot[t / pair][p][t % pair], segments[p].out[t]);
  }
}

// f(integral_constant n) for a run-time 1 <= n <= N.
template <int N, class F>
inline void with_constant(int64_t n, F f) {
  if constexpr (N > 1) {
    if (n < N) return with_constant<N - 1>(n, f);
  }
  f(std::integral_constant<int, N>{});
}

// f(first, constant count) over even blocks of at most N tokens.
template <int N, class F>
inline void blocks(int64_t count, F f) {
  for (int64_t first = 0, left = ceil_div(count, N); left > 0; --left) {
    const int64_t n = ceil_div(count - first, left);
    with_constant<N>(n, [&](auto constant) { f(first, constant); });
    first += n;
  }
}

template <class V, int bits>
void product_bits(const Matrices& m, const Panel* panels, int64_t width, const Token* tokens, int64_t count,
                  uint8_t* scratch) {
  constexpr int64_t chunk = bits == 4 ? 32 : 64, segment_chunks = kSegment / chunk;
  for (int64_t group = 0; group < m.groups; ++group) {
    for (int64_t c = 0; c < m.chunks(); c += segment_chunks) {
      const int64_t left = m.chunks() - c, chunks = left < segment_chunks ? left : segment_chunks;
      const int64_t column = group * m.padded_columns() + c * chunk;
      Segment segments[kWidth];
      for (int64_t p = 0; p < width; ++p) {
        const uint8_t* header = panels[p].data + group * m.group_bytes();
        const uint8_t* data = header + kHeader + c * m.chunk_bytes();
        segments[p] = {header, data, chunks, column, c == 0, column == 0, panels[p].out};
      }
      if constexpr (V::tiles) {
        if (count > V::decode_once_above) {
          dense_tiles<V, bits>(segments, width, tokens, count, scratch);
          continue;
        }
      }
      if constexpr (V::paired_tokens > 0) {
        if (width == 2 && count <= V::paired_tokens) {
          with_constant<V::paired_tokens>(count, [&](auto n) { direct<V, bits, n, 2>(segments, tokens, 0); });
          continue;
        }
      }
      for (int64_t p = 0; p < width; ++p) {
        const Segment* segment = segments + p;
        if (count > V::decode_once_above) {
          const int64_t bytes = chunks * m.chunk_bytes();
          decode<V, bits>(*segment, scratch);
          blocks<V::dense_tokens>(count, [&](int64_t first, auto n) {
            // The next segment follows this one in memory, and all blocks of tokens together fetch it.
            const uint8_t* ahead = segment->data + bytes + bytes * first / count;
            dense<V, n>(*segment, scratch, chunks * chunk, ahead, kTable * bits / 8 * n / count + 1, tokens, first);
          });
        } else {
          blocks<V::direct_tokens>(count,
                                   [&](int64_t first, auto n) { direct<V, bits, n, 1>(segment, tokens, first); });
        }
      }
    }
  }
}

template <class V>
void product(const Matrices& m, const Panel* panels, int64_t width, const Token* tokens, int64_t count,
             uint8_t* scratch) {
  if (m.bits == 4) return product_bits<V, 4>(m, panels, width, tokens, count, scratch);
  if (m.bits == 3) return product_bits<V, 3>(m, panels, width, tokens, count, scratch);
  product_bits<V, 2>(m, panels, width, tokens, count, scratch);
}

template <class V>
int64_t micro_kernel(int64_t repeats) {
  constexpr int64_t columns = 512;
  alignas(64) uint8_t memory[kWidth * columns * kRows + 32 * columns] = {};  // decoded panels, then levels
  uint8_t* const levels = memory + kWidth * columns * kRows;
  if constexpr (V::tiles) {
    const typename V::Session session;
    alignas(64) int32_t dot[kWidth][V::tile_tokens][kRows];
    for (int64_t i = 0; i < repeats; ++i) {
      V::multiply(memory, true, 0, kBlockTiles, levels, columns, true, i == 0, dot, [](int64_t, int64_t, int64_t) {});
    }
    return 2 * repeats * columns * kWidth * kRows * V::tile_tokens;
  }
  float out[V::dense_tokens][kRows] = {};
  Token tokens[V::dense_tokens];
  for (int64_t t = 0; t < V::dense_tokens; ++t) tokens[t] = {levels + t * columns, 0.0f, 0.0f, 0};
  const Segment segment{memory, memory, 0, 0, true, true, out};
  for (int64_t i = 0; i < repeats; ++i) {
    dense<V, V::dense_tokens>(segment, memory, columns, memory, 0, tokens, 0);
    __asm__ volatile("" ::"r"(memory), "r"(out) : "memory");  // someone might look: nothing may be left out
  }
  return 2 * repeats * columns * kRows * V::dense_tokens;
}

// Plain loops from here on: the compiler vectorizes them for the instruction set of the source that includes this.

inline float smaller(float a, float b) { return a < b ? a : b; }
inline float larger(float a, float b) { return a > b ? a : b; }

struct Range {
  float lo, hi;
  bool finite;
};

inline Range range(const float* x, int64_t count) {
  constexpr int64_t width = 32;  // independent minima, for the compiler may not reorder a single chain
  float lo[width], hi[width], zero[width];
  for (int64_t j = 0; j < width; ++j) lo[j] = hi[j] = x[0], zero[j] = x[0] * 0.0f;
  int64_t i = 0;
  for (; i + width <= count; i += width) {
    for (int64_t j = 0; j < width; ++j) {
      const float v = x[i + j];
      lo[j] = smaller(v, lo[j]);
      hi[j] = larger(v, hi[j]);
      zero[j] += v * 0.0f;  // NaN from the first value on that is not finite
    }
  }
  for (; i < count; ++i) {
    lo[0] = smaller(x[i], lo[0]);
    hi[0] = larger(x[i], hi[0]);
    zero[0] += x[i] * 0.0f;
  }
  for (int64_t j = 1; j < width; ++j) {
    lo[0] = smaller(lo[j], lo[0]);
    hi[0] = larger(hi[j], hi[0]);
    zero[0] += zero[j];
  }
  return {lo[0], hi[0], zero[0] == 0.0f};
}

template <int P>
void quantize_row(const float* x, int64_t count, float lo, float inverse, float top, uint8_t* level, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    const float rounded = __builtin_rintf((x[i] - lo) * inverse);                        // half to even
    const int32_t v = static_cast<int32_t>(smaller(larger(rounded, 0.0f), top));  // NaN (0 * inf) becomes 0
    for (int p = 0; p < P; ++p) level[p * stride + i] = static_cast<uint8_t>(v >> (8 * (P - 1 - p)));
  }
}

void quantize(const Matrices& m, const float* x, int64_t bits, float clip, uint8_t* level, Token* tokens) {
  const int count = planes(bits);
  const float top = static_cast<float>((1 << (count > 1 ? 24 : bits)) - 1);
  const Range r = range(x, m.columns);
  const float nan = __builtin_nanf("");
  if (count > 1) clip = 1.0f;  // "not quantized" is not clipped either
  const float lo = r.finite ? r.lo * clip : nan, hi = r.finite ? r.hi * clip : nan;
  const float width = hi - lo;
  const float inverse = width > 0.0f ? 1.0f / width * top : 0.0f;
  const int64_t stride = m.level_bytes(), columns = m.group_columns(), padded = m.padded_columns();
  if (padded != columns) std::memset(level, 0, static_cast<size_t>(count * stride));
  for (int64_t group = 0; group < m.groups; ++group) {
    (count > 1 ? quantize_row<kMaxPlanes> : quantize_row<1>)(x + group * columns, columns, lo, inverse, top,
                                                             level + group * padded, stride);
  }
  float step = width / top;
  const int32_t zero = 1 << (count > 1 ? 7 : bits - 1);
  const float middle = lo + step * ((top + 1.0f) / 2.0f);
  for (int p = count - 1; p >= 0; --p, step *= 256.0f) {
    tokens[p] = p == 0 ? Token{level, step, middle, zero} : Token{level + p * stride, step, 0.0f, 0};
  }
}

// e**x to 2 units in the last place, without a branch or a call: 2**n * e**f with |f| <= ln(2) / 2 and Taylor's series.
inline float exponential(float x) {
  x = smaller(larger(x, -87.0f), 88.0f);  // also maps NaN to a number; the callers keep it by another factor
  const float n = __builtin_rintf(x * 1.44269504f);
  const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts, the first exact in 9 bits
  float p = 1.0f / 5040;
  p = p * f + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f * f + f + 1.0f;
  return p * float_of(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

template <class F>
inline void apply(float* gate, const float* up, int64_t count, F f) {
  if (up == nullptr) {
    for (int64_t i = 0; i < count; ++i) gate[i] = f(gate[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) gate[i] = f(gate[i]) * up[i];
  }
}

void activate(Activation activation, float* gate, const float* up, int64_t count) {
  switch (activation) {
    case Activation::silu:
      return apply(gate, up, count, [](float x) { return x / (1.0f + exponential(-x)); });
    case Activation::gelu:
      return apply(gate, up, count, [](float x) { return x * 0.5f * (1.0f + __builtin_erff(x * 0.70710678f)); });
    case Activation::gelu_tanh:  // 0.5 * (1 + tanh(z)) = 1 / (1 + e**(-2 z))
      return apply(gate, up, count, [](float x) {
        return x / (1.0f + exponential(-1.59576912f * (x + 0.044715f * x * x * x)));
      });
    case Activation::relu:
      return apply(gate, up, count, [](float x) { return x > 0.0f || x != x ? x : 0.0f; });
  }
}

template <class V>
constexpr Isa make_isa(const char* name, bool (*supported)()) {
  return {name, supported, V::tiles, quantize, product<V>, activate, transform, micro_kernel<V>, widen, narrow};
}

}  // namespace
}  // namespace codequant
