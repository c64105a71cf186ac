// AVX-512 with VNNI (Ice Lake and later servers, Zen 4 and later).
#include "avx512.h"

namespace codequant {

const Isa kAvx512Vnni = make_isa<Avx512Vnni>("avx512_vnni", has_avx512_vnni);

}  // namespace codequant
