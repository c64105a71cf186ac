// One source, several instruction sets. Before each inclusion define CODEQUANT_BODY, the name of a header whose
// functions are all marked CODEQUANT_TARGET: it is compiled once per instruction set, into the namespaces `baseline`
// and, on x86, `avx2` and `avx512`, with CODEQUANT_VECTOR_BYTES the width of a register there; CODEQUANT_SELECT(function)
// is the version for this processor. (GCC's own target_clones splits vector comparisons into scalars before it clones,
// which makes the search of clustering.cpp 8 times slower.)
// CODEQUANT_ISA, as the kernels know it (dispatch.cpp), asks for less than the processor has.
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define CODEQUANT_VECTOR_BYTES 64
#define CODEQUANT_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
namespace {
namespace avx512 {
#include CODEQUANT_BODY
}
}
#undef CODEQUANT_TARGET
#undef CODEQUANT_VECTOR_BYTES
#define CODEQUANT_VECTOR_BYTES 32
#define CODEQUANT_TARGET __attribute__((target("avx2,fma")))
namespace {
namespace avx2 {
#include CODEQUANT_BODY
}
}
#undef CODEQUANT_TARGET
#undef CODEQUANT_VECTOR_BYTES
#endif
#define CODEQUANT_VECTOR_BYTES 16
#define CODEQUANT_TARGET
namespace {
namespace baseline {
#include CODEQUANT_BODY
}
}
#undef CODEQUANT_TARGET
#undef CODEQUANT_VECTOR_BYTES
#undef CODEQUANT_BODY

#ifndef CODEQUANT_SELECT
#if defined(__x86_64__) && defined(__GNUC__)
inline int instruction_set() {
    const char* wanted = std::getenv("CODEQUANT_ISA");
    if (wanted && !std::strcmp(wanted, "portable")) return 0;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (wanted && (!std::strcmp(wanted, "avx2") || !std::strcmp(wanted, "avx_vnni"))) return 1;
    return __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl")
               ? 2
               : 1;
}
#define CODEQUANT_SELECT(function)                     \
    (instruction_set() == 2   ? avx512::function       \
     : instruction_set() == 1 ? avx2::function         \
                              : baseline::function)
#else
#define CODEQUANT_SELECT(function) baseline::function
#endif
#endif
