// AVX-512 with the tile multiplier (Sapphire Rapids and later servers), for panels that many tokens share. Tiles can do
// 6.2 against VNNI's 0.85 T operations/s of one core; fetching activations from the second cache leaves 1.2 of them.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512.h"

namespace codequant {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// All eight tiles are 16 rows of 64 bytes while one of these lives. The caller's configuration, which oneDNN may rely
// on, is put back afterwards.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    TileConfig config{};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(&before_);
    }
  }

 private:
  TileConfig before_;
};

struct Amx : Avx512Vnni {
  static constexpr int decode_once_above = 16;  // below, VNNI on the way is as fast
  static constexpr bool tiles = true;
  using Session = Tiles;

  // A tile of weights has four columns (bytes) of all 16 rows (dwords) in each of its 16 lines: transpose the dwords.
  static void store_step(uint8_t* p, const Bytes (&w)[4]) {
    const __m512i ab_low = _mm512_unpacklo_epi32(w[0], w[1]), ab_high = _mm512_unpackhi_epi32(w[0], w[1]);
    const __m512i cd_low = _mm512_unpacklo_epi32(w[2], w[3]), cd_high = _mm512_unpackhi_epi32(w[2], w[3]);
    store(p, _mm512_unpacklo_epi64(ab_low, cd_low));
    store(p + 64, _mm512_unpackhi_epi64(ab_low, cd_low));
    store(p + 128, _mm512_unpacklo_epi64(ab_high, cd_high));
    store(p + 192, _mm512_unpackhi_epi64(ab_high, cd_high));
  }

  // dot[token][row] for 16 or 32 tokens, whose levels are `stride` bytes apart. Even and odd tiles of columns have sums
  // of their own, since one product takes 52 cycles to come out and 16 to start.
  static constexpr int64_t tile_tokens = 32;
  static void multiply(const uint8_t* weights, int64_t columns, const uint8_t* level, int64_t stride, bool both,
                       int32_t (*dot)[kRows]) {
    const uint8_t* second = level + 16 * stride;
    const size_t step = static_cast<size_t>(stride);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t column = 0; column < columns; column += 128, weights += 2048) {
      _tile_loadd(6, weights, 64);
      _tile_loadd(4, level + column, step);
      _tile_dpbusd(0, 4, 6);
      if (both) {
        _tile_loadd(5, second + column, step);
        _tile_dpbusd(1, 5, 6);
      }
      if (column + 64 >= columns) break;
      _tile_loadd(7, weights + 1024, 64);
      _tile_loadd(4, level + column + 64, step);
      _tile_dpbusd(2, 4, 7);
      if (both) {
        _tile_loadd(5, second + column + 64, step);
        _tile_dpbusd(3, 5, 7);
      }
    }
    alignas(64) int32_t odd[tile_tokens][kRows];
    _tile_stored(0, dot[0], 64);
    _tile_stored(2, odd[0], 64);
    if (both) {
      _tile_stored(1, dot[16], 64);
      _tile_stored(3, odd[16], 64);
    }
    for (int64_t t = 0; t < (both ? 32 : 16); ++t) {
      for (int64_t r = 0; r < kRows; ++r) dot[t][r] += odd[t][r];
    }
  }
};

bool supported() {
  constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx512_vnni() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & tile) && (d & int8) &&
         syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

}  // namespace

const Isa kAmx = make_isa<Amx>("amx", supported);

}  // namespace codequant
