// The kernels' own layout of a packed weight matrix, made when a model is loaded (repack.cpp). This file is its only
// definition; the format on disk is packing.py's and knows nothing of it.
//
// Sixteen rows make a panel. For every codebook group of a panel, in order:
//
//     int8    table[16 lanes][16]    the codebooks, repeated to 16 entries where they have 4 or 8
//     float   step[16 rows]
//     int32   row_sum[16 rows]       sum of the group's entries, for the zero point of the activations
//     chunks of the group's columns, the last one padded with index 0
//
// A lane is 16 bytes, the width in which byte shuffles (pshufb, tbl) look up: one lane is one row, so a register of 1,
// 2 or 4 lanes looks up 1, 2 or 4 rows at once. Row i sits in lane (i % 4) * 4 + i / 4: then the usual tree of unpacks
// and adds over the four registers i % 4 leaves the sums of the rows in their order.
//
// A chunk holds 32 columns (4 bits) or 64 (2 and 3 bits) in steps of 16. Byte j of a lane holds column 16 * s + j of
// every step s: at bits 4s of the byte (4-bit indices), or their low two bits at bits 2s (2 and 3 bits). 3-bit indices
// have their top bits in 8 more lanes after the 16: lane (i % 4) / 2 * 4 + i / 4, bit (i % 2) * 4 + s of byte j.
//
// Rows that pad the last panel have step 0 and entries 0. Activation levels are 0 in padded columns, so their entries
// never count; row_sum covers true columns only.
#pragma once

#include <cstdint>

#define ALWAYS_INLINE __attribute__((always_inline))  // for the reason given in panel.h

namespace codequant {

constexpr int64_t kRows = 16;                                     // rows of a panel
constexpr int64_t kStep = 16;                                     // columns of a step: bytes of a lane
constexpr int64_t kTable = kRows * kStep;                         // bytes of the tables; also of one decoded step
constexpr int64_t kHeader = kTable + kRows * 4 + kRows * 4;       // tables, steps, row sums
constexpr int64_t kSegment = 2048;                                // most columns of one integer sum: see panel.h

ALWAYS_INLINE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
ALWAYS_INLINE inline int64_t lane(int64_t row) { return row % 4 * 4 + row / 4; }

// A stack of matrices of one shape. Passed by pointer from Python (kernels/cpu.py mirrors it): no other fields.
struct Matrices {
  uint8_t* panels;
  int64_t count;    // matrices in the stack
  int64_t rows;     // output channels
  int64_t columns;  // input channels
  int64_t groups;   // codebooks per row
  int64_t bits;

  ALWAYS_INLINE int64_t group_columns() const { return columns / groups; }
  ALWAYS_INLINE int64_t chunk() const { return bits == 4 ? 32 : 64; }
  ALWAYS_INLINE int64_t chunk_bytes() const { return chunk() * kRows * bits / 8; }
  ALWAYS_INLINE int64_t chunks() const { return ceil_div(group_columns(), chunk()); }  // of a group
  ALWAYS_INLINE int64_t padded_columns() const { return chunks() * chunk(); }          // of a group
  ALWAYS_INLINE int64_t group_bytes() const { return kHeader + chunks() * chunk_bytes(); }
  ALWAYS_INLINE int64_t panel_bytes() const { return groups * group_bytes(); }
  ALWAYS_INLINE int64_t panels_each() const { return ceil_div(rows, kRows); }
  ALWAYS_INLINE int64_t bytes() const { return count * panels_each() * panel_bytes(); }
  // One plane of one token's levels: an odd number of cache lines, so that tokens spread over the sets of the cache.
  ALWAYS_INLINE int64_t level_bytes() const { return (ceil_div(groups * padded_columns(), 64) | 1) * 64; }
  ALWAYS_INLINE uint8_t* panel(int64_t matrix, int64_t index) const {
    return panels + (matrix * panels_each() + index) * panel_bytes();
  }
};

}  // namespace codequant
