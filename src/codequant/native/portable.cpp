// Plain C++ for any processor: slow, and the yardstick of the others.
#include "panel.h"

namespace codequant {
namespace {

struct Portable {
  static constexpr int lanes = 1;
  static constexpr int direct_tokens = 1, paired_tokens = 0, dense_tokens = 1, decode_once_above = 1;
  static constexpr bool tiles = false;
  struct Bytes {
    uint8_t v[kStep];
  };
  struct Sums {
    int32_t v[4];
  };
  template <class F>
  static Bytes each(F f) {
    Bytes r;
    for (int i = 0; i < kStep; ++i) r.v[i] = static_cast<uint8_t>(f(i));
    return r;
  }
  static Bytes load(const uint8_t* p) {
    Bytes r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static void store(uint8_t* p, const Bytes& b) { std::memcpy(p, b.v, sizeof b.v); }
  static Bytes broadcast(const uint8_t* p) { return load(p); }
  template <int n>
  static Bytes shift(const Bytes& b) {
    return each([&](int i) { return n >= 0 ? b.v[i] >> (n > 0 ? n : 0) : b.v[i] << (n < 0 ? -n : 0); });
  }
  static Bytes low4(const Bytes& b) {
    return each([&](int i) { return b.v[i] & 15; });
  }
  static Bytes low2(const Bytes& a, const Bytes& b) {
    return each([&](int i) { return (a.v[i] & 3) | (b.v[i] & ~3); });
  }
  static Bytes lookup(const Bytes& table, const Bytes& index) {
    return each([&](int i) { return table.v[index.v[i]]; });
  }
  static Sums dot(Sums sum, const Bytes& u, const Bytes& s) {
    for (int i = 0; i < kStep; ++i) sum.v[i / 4] += u.v[i] * static_cast<int8_t>(s.v[i]);
    return sum;
  }
  static void reduce(const Sums (&sums)[4], int32_t* out) {
    for (int g = 0; g < 4; ++g) out[g] = sums[g].v[0] + sums[g].v[1] + sums[g].v[2] + sums[g].v[3];
  }
};

}  // namespace

const Isa kPortable = make_isa<Portable>("portable", [] { return true; });

}  // namespace codequant
