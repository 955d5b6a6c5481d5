// The registry of kernels, preferred ones first.
#include "kernels.h"

#include "few_wide.h"

namespace native {

extern const Kernel amx_bf16, amx_int8, amx_int16;
extern const Kernel int8_avx2, int8_avxvnni, int8_avx512vnni;
extern const Kernel int16_avx2, int16_avxvnni, int16_avx512vnni;
extern const Kernel int8_i8mm, int8_dotprod;

const Kernel *const kernels[] = {
#ifdef NATIVE_HAS_AMX
    &amx_bf16,
    &amx_int8,
#endif
#ifdef NATIVE_HAS_AVX512VNNI
    &int8_avx512vnni,
    &int16_avx512vnni,
#endif
#ifdef NATIVE_HAS_AVXVNNI
    &int8_avxvnni,
    &int16_avxvnni,
#endif
#ifdef __x86_64__
    &int8_avx2,
    &int16_avx2,
#endif
#ifdef NATIVE_HAS_I8MM
    &int8_i8mm,
#endif
#ifdef NATIVE_HAS_DOTPROD
    &int8_dotprod,
#endif
    nullptr,
};

#ifdef NATIVE_HAS_AMX
const Kernel *const transposed_int8 = &amx_int16;
#else
const Kernel *const transposed_int8 = nullptr;
#endif

extern const WideKernel few_wide_avx512vnni, few_wide_avx2;

const WideKernel *const wide_kernels[] = {
#ifdef NATIVE_HAS_AVX512VNNI
    &few_wide_avx512vnni,
#endif
#ifdef __x86_64__
    &few_wide_avx2,
#endif
    nullptr,
};

extern const AttentionKernel attention_avx512vnni;
#ifdef NATIVE_HAS_AVX512VNNI
const AttentionKernel *const wide_attention = &attention_avx512vnni;
#else
const AttentionKernel *const wide_attention = nullptr;
#endif

}  // namespace native
