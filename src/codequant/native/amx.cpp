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
  static constexpr int decode_once_above = 6;  // VNNI on the way is faster below
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

  // Adds to dot[panel][token][row], or where `start` sets it, for one panel or two and 16 tokens or 32. `weights` are
  // the decoded columns of one panel after those of the other. One product takes 52 cycles to come out and 16 to start,
  // so that four sums in turn keep the multiplier busy. Fetches `pace` bytes of each `ahead` per tile of columns.
  static constexpr int64_t tile_tokens = 32;
  static void multiply(const uint8_t* weights, bool two_panels, int64_t columns, const uint8_t* level, int64_t stride,
                       bool two_tiles, bool start, const uint8_t* const (&ahead)[kWidth], int64_t pace,
                       int32_t (&dot)[2][tile_tokens][kRows]) {
    const uint8_t* second_weights = weights + columns * kRows;
    const uint8_t* second_level = level + 16 * stride;
    const size_t step = static_cast<size_t>(stride);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (!start) {
      _tile_loadd(0, dot[0][0], 64);
      if (two_tiles) _tile_loadd(1, dot[0][16], 64);
      if (two_panels) _tile_loadd(2, dot[1][0], 64);
      if (two_tiles && two_panels) _tile_loadd(3, dot[1][16], 64);
    }
    int64_t fetched = 0;
    for (int64_t column = 0; column < columns; column += 64) {
      for (int64_t end = fetched + pace; fetched < end; fetched += kLine) {
        __builtin_prefetch(ahead[0] + fetched, 0, 2);
        __builtin_prefetch(ahead[1] + fetched, 0, 2);
      }
      _tile_loadd(6, weights + column * kRows, 64);
      _tile_loadd(4, level + column, step);
      _tile_dpbusd(0, 4, 6);
      if (two_tiles) {
        _tile_loadd(5, second_level + column, step);
        _tile_dpbusd(1, 5, 6);
      }
      if (two_panels) {
        _tile_loadd(7, second_weights + column * kRows, 64);
        _tile_dpbusd(2, 4, 7);
        if (two_tiles) _tile_dpbusd(3, 5, 7);
      }
    }
    _tile_stored(0, dot[0][0], 64);
    if (two_tiles) _tile_stored(1, dot[0][16], 64);
    if (two_panels) _tile_stored(2, dot[1][0], 64);
    if (two_tiles && two_panels) _tile_stored(3, dot[1][16], 64);
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
