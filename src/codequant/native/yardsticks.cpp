// What memory and arithmetic give, the yardsticks of `codequant bench cpu`: decoding can be no faster than reading, and
// many tokens no faster than their products.
#include <atomic>

#include "isa.h"
#include "threads.h"

// XOR of all 8-byte words of data, so that every byte is read. bytes: a multiple of 64.
CODEQUANT_API uint64_t codequant_read(const uint64_t* data, int64_t bytes, int64_t threads) {
  std::atomic<uint64_t> result{0};
  codequant::parallel_for(threads, threads, [&](int64_t part) {
    const int64_t lines = bytes / 64, first = lines * part / threads, last = lines * (part + 1) / threads;
    uint64_t word[8] = {};
    for (int64_t i = first; i < last; ++i) {
      __builtin_prefetch(data + 8 * i + 512, 0, 2);  // the distances of panel.h
      __builtin_prefetch(data + 8 * i + 128, 0, 3);
      for (int j = 0; j < 8; ++j) word[j] ^= data[8 * i + j];
    }
    for (const uint64_t w : word) result ^= w;
  });
  return result;
}

// The chosen instruction set's micro-kernel on operands in the first cache; returns the additions and multiplications.
CODEQUANT_API int64_t codequant_micro_kernel(int64_t repeats) { return codequant::isa().micro_kernel(repeats); }
