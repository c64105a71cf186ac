// Between the format on disk (packing.py) and the kernels' panels (layout.h), both ways.
#include <cstring>
#include <vector>

#include "isa.h"
#include "threads.h"

namespace codequant {
namespace {

// Indices of 4, 3 or 2 bits, eight of which fill `bits` bytes. Both sides have room for the last octet and four bytes
// more: octets are read and written as whole words.
template <int bits>
void unpack_row(const uint8_t* __restrict packed, int64_t columns, uint8_t* __restrict index) {
  if constexpr (bits == 4) {  // a loop that vectorizes
    for (int64_t i = 0; 2 * i < columns; ++i) {
      index[2 * i] = packed[i] & 15;
      index[2 * i + 1] = packed[i] >> 4;
    }
  } else {
    for (int64_t i = 0; i < columns; i += 8, packed += bits) {
      uint32_t octet;
      std::memcpy(&octet, packed, sizeof octet);
      for (int j = 0; j < 8; ++j) index[i + j] = octet >> (j * bits) & ((1 << bits) - 1);
    }
  }
}

template <int bits>
void pack_row(const uint8_t* index, int64_t columns, uint8_t* packed) {
  for (int64_t i = 0; i < columns; i += 8, packed += bits) {
    uint32_t octet = 0;
    for (int j = 0; j < 8; ++j) octet |= static_cast<uint32_t>(index[i + j]) << (j * bits);
    std::memcpy(packed, &octet, sizeof octet);
  }
}

// The bytes of one row's lane within a chunk: its low bits and, for 3 bits, where its high bits are.
template <int bits>
struct RowOfChunk {
  static constexpr int steps = bits == 4 ? 2 : 4, low_bits = bits == 4 ? 4 : 2;
  int64_t row;
  int64_t low() const { return lane(row) * kStep; }
  int64_t high() const { return kTable + (row % 4 / 2 * 4 + row / 4) * kStep; }
  int high_shift() const { return static_cast<int>(row % 2) * 4; }

  void write(const uint8_t* __restrict index, uint8_t* __restrict chunk) const {
    uint8_t* __restrict low_byte = chunk + low();
    for (int j = 0; j < kStep; ++j) {
      int byte = 0;
      for (int s = 0; s < steps; ++s) byte |= (index[s * kStep + j] & ((1 << low_bits) - 1)) << (s * low_bits);
      low_byte[j] = static_cast<uint8_t>(byte);
    }
    if constexpr (bits == 3) {
      uint8_t* __restrict high_byte = chunk + high();  // shared by two rows
      for (int j = 0; j < kStep; ++j) {
        int byte = 0;
        for (int s = 0; s < steps; ++s) byte |= index[s * kStep + j] >> low_bits << (s + high_shift());
        high_byte[j] = static_cast<uint8_t>(high_byte[j] | byte);
      }
    }
  }

  void read(const uint8_t* chunk, uint8_t* index) const {
    for (int j = 0; j < kStep; ++j) {
      for (int s = 0; s < steps; ++s) {
        int value = chunk[low() + j] >> (s * low_bits) & ((1 << low_bits) - 1);
        if (bits == 3) value |= (chunk[high() + j] >> (high_shift() + s) & 1) << 2;
        index[s * kStep + j] = static_cast<uint8_t>(value);
      }
    }
  }
};

// PackedWeight, with steps widened to float (exact). Packed rows may lie in several parts, each of `part_rows`.
struct Format {
  uint8_t* const* packed;
  int64_t part_rows;
  int8_t* codebook;
  float* step;

  uint8_t* packed_row(int64_t row, int64_t bytes) const { return packed[row / part_rows] + row % part_rows * bytes; }
};

// One thread's buffers.
struct Buffers {
  explicit Buffers(const Matrices& m)
      : row(static_cast<size_t>(m.columns + 8)),
        bits(static_cast<size_t>(m.columns + 8)),
        group(static_cast<size_t>(m.padded_columns())),
        ones(static_cast<size_t>(m.padded_columns())),
        scratch(kScratch) {
    std::memset(ones.data(), 1, static_cast<size_t>(m.group_columns()));
  }
  std::vector<uint8_t> row, bits, group, ones, scratch;
};

template <int bits>
void to_panel(const Matrices& m, int64_t matrix, int64_t index, const Format& format, Buffers& buffers) {
  constexpr int entries = 1 << bits;
  const int64_t row_bytes = ceil_div(m.columns * bits, 8), columns = m.group_columns();
  uint8_t* panel = m.panel(matrix, index);
  std::memset(panel, 0, static_cast<size_t>(m.panel_bytes()));
  for (int64_t i = 0; i < kRows && index * kRows + i < m.rows; ++i) {
    const int64_t row = matrix * m.rows + index * kRows + i;
    std::memcpy(buffers.bits.data(), format.packed_row(row, row_bytes), static_cast<size_t>(row_bytes));
    unpack_row<bits>(buffers.bits.data(), m.columns, buffers.row.data());
    for (int64_t group = 0; group < m.groups; ++group) {
      uint8_t* header = panel + group * m.group_bytes();
      const int8_t* codebook = format.codebook + (row * m.groups + group) * entries;
      for (int j = 0; j < kStep; ++j) header[lane(i) * kStep + j] = static_cast<uint8_t>(codebook[j % entries]);
      std::memcpy(buffers.group.data(), buffers.row.data() + group * columns, static_cast<size_t>(columns));
      for (int64_t c = 0; c < m.chunks(); ++c) {
        RowOfChunk<bits>{i}.write(buffers.group.data() + c * m.chunk(), header + kHeader + c * m.chunk_bytes());
      }
    }
  }
  // The row sums are the product with ones; it is exact, since 127 * 2**17 columns < 2**24.
  Matrices one_group = m;
  one_group.columns = columns;
  one_group.groups = 1;
  const Token ones{buffers.ones.data(), 1.0f, 0.0f, 0};
  for (int64_t group = 0; group < m.groups; ++group) {
    uint8_t* header = panel + group * m.group_bytes();
    float step[kRows], sum[1][kRows];
    int32_t row_sum[kRows];
    for (float& s : step) s = 1.0f;
    std::memcpy(header + kTable, step, sizeof step);
    const Panel one{header, sum};
    isa().product(one_group, &one, 1, &ones, 1, buffers.scratch.data());
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t row = index * kRows + i;
      step[i] = row < m.rows ? format.step[(matrix * m.rows + row) * m.groups + group] : 0.0f;
      row_sum[i] = static_cast<int32_t>(sum[0][i]);
    }
    std::memcpy(header + kTable, step, sizeof step);
    std::memcpy(header + kTable + sizeof step, row_sum, sizeof row_sum);
  }
}

template <int bits>
void from_panel(const Matrices& m, int64_t matrix, int64_t index, const Format& format, Buffers& buffers) {
  constexpr int entries = 1 << bits;
  const int64_t row_bytes = ceil_div(m.columns * bits, 8), columns = m.group_columns();
  const uint8_t* panel = m.panel(matrix, index);
  for (int64_t i = 0; i < kRows && index * kRows + i < m.rows; ++i) {
    const int64_t row = matrix * m.rows + index * kRows + i;
    for (int64_t group = 0; group < m.groups; ++group) {
      const uint8_t* header = panel + group * m.group_bytes();
      std::memcpy(format.codebook + (row * m.groups + group) * entries, header + lane(i) * kStep, entries);
      std::memcpy(format.step + row * m.groups + group, header + kTable + i * 4, 4);
      for (int64_t c = 0; c < m.chunks(); ++c) {
        RowOfChunk<bits>{i}.read(header + kHeader + c * m.chunk_bytes(), buffers.group.data() + c * m.chunk());
      }
      std::memcpy(buffers.row.data() + group * columns, buffers.group.data(), static_cast<size_t>(columns));
    }
    std::memset(buffers.row.data() + m.columns, 0, 8);
    pack_row<bits>(buffers.row.data(), m.columns, buffers.bits.data());
    std::memcpy(format.packed_row(row, row_bytes), buffers.bits.data(), static_cast<size_t>(row_bytes));
  }
}

template <class F>
void each_panel(const Matrices& m, int64_t threads, F f) {
  // A thread takes as many panels as a huge page holds: two that meet in a page nobody has touched both clear it whole.
  constexpr int64_t kHugePage = 1 << 21;
  const int64_t panels = m.count * m.panels_each(), block_panels = ceil_div(kHugePage, m.panel_bytes());
  parallel_for(threads, ceil_div(panels, block_panels), [&](int64_t block) {
    Buffers buffers(m);
    for (int64_t i = block * block_panels; i < panels && i < (block + 1) * block_panels; ++i) {
      f(i / m.panels_each(), i % m.panels_each(), buffers);
    }
  });
}

}  // namespace
}  // namespace codequant

CODEQUANT_API int64_t codequant_bytes(const codequant::Matrices* m) { return m->bytes(); }

// packed uint8 [count, rows, ceil(columns * bits / 8)] in parts of part_rows rows each, codebook int8 [count, rows, groups,
// 2**bits], step float [count, rows, groups] -> m->panels, which has codequant_bytes(m) bytes.
CODEQUANT_API void codequant_to_panels(const codequant::Matrices* m, uint8_t* const* packed, int64_t part_rows,
                                       int8_t* codebook, float* step, int64_t threads) {
  codequant::each_panel(*m, threads, [&](int64_t matrix, int64_t index, codequant::Buffers& buffers) {
    const auto convert = m->bits == 4   ? codequant::to_panel<4>
                         : m->bits == 3 ? codequant::to_panel<3>
                                        : codequant::to_panel<2>;
    convert(*m, matrix, index, {packed, part_rows, codebook, step}, buffers);
  });
}

// The inverse.
CODEQUANT_API void codequant_from_panels(const codequant::Matrices* m, uint8_t* const* packed, int64_t part_rows,
                                         int8_t* codebook, float* step, int64_t threads) {
  codequant::each_panel(*m, threads, [&](int64_t matrix, int64_t index, codequant::Buffers& buffers) {
    const auto convert = m->bits == 4   ? codequant::from_panel<4>
                         : m->bits == 3 ? codequant::from_panel<3>
                                        : codequant::from_panel<2>;
    convert(*m, matrix, index, {packed, part_rows, codebook, step}, buffers);
  });
}
