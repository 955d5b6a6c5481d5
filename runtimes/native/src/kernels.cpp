// The kernels there are, the preferred ones first.
#include "kernels.h"

namespace native {

extern const Kernel int16_avx2, int16_avxvnni, int16_avx512vnni, amx_bf16, amx_int8;

const Kernel *const kernels[] = {
#ifdef NATIVE_HAS_AMX
    &amx_bf16,
    &amx_int8,
#endif
#ifdef NATIVE_HAS_AVX512VNNI
    &int16_avx512vnni,
#endif
#ifdef NATIVE_HAS_AVXVNNI
    &int16_avxvnni,
#endif
    &int16_avx2,
    nullptr,
};

}  // namespace native
