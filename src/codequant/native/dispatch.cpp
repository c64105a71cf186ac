// Which instruction set runs: the best that the processor has, until Python asks for another (CODEQUANT_ISA).
#include <atomic>
#include <cstring>

#include "isa.h"

namespace codequant {
namespace {

const Isa* const kBestFirst[] = {
#if defined(__x86_64__)
    &kAmx, &kAvx512Vnni, &kAvxVnni, &kAvx2,
#elif defined(__aarch64__) && defined(__linux__)
    &kNeon,
#endif
    &kPortable};

const Isa* best() {
  for (const Isa* candidate : kBestFirst) {
    if (candidate->supported()) return candidate;
  }
  return &kPortable;
}

std::atomic<const Isa*> chosen{best()};

}  // namespace

const Isa& isa() { return *chosen.load(std::memory_order_relaxed); }

}  // namespace codequant

// The index-th instruction set that this processor has, best first, or null past the last.
CODEQUANT_API const char* codequant_isa(int64_t index) {
  for (const codequant::Isa* candidate : codequant::kBestFirst) {
    if (candidate->supported() && index-- == 0) return candidate->name;
  }
  return nullptr;
}

// Choose one of them by name; 0 on success.
CODEQUANT_API int codequant_use_isa(const char* name) {
  for (const codequant::Isa* candidate : codequant::kBestFirst) {
    if (candidate->supported() && std::strcmp(candidate->name, name) == 0) {
      codequant::chosen.store(candidate);
      return 0;
    }
  }
  return 1;
}
