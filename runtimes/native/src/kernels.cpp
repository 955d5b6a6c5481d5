// The kernels there are, the preferred ones first, and which attention is taken.
#include "kernels.h"

#include "few_wide.h"

namespace native {

extern const Kernel amx_bf16, amx_int8;
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

extern const ManyQueries attention_avx2, attention_avx512vnni;

const ManyQueries *const attentions[] = {
#ifdef NATIVE_HAS_AVX512VNNI
    &attention_avx512vnni,
#endif
#ifdef __x86_64__
    &attention_avx2,
#endif
    nullptr,
};

static const ManyQueries *attention(int width) {
    const ManyQueries *const *a = attentions;
    while (*a && !((*a)->works() && (*a)->takes(width))) a++;
    return *a;
}

bool attends(int width) { return attention(width); }
bool attend(const Attention &a, int threads, Scratch &scratch) {
    const ManyQueries *taken = attention(a.width);
    return taken && taken->attend(a, threads, scratch);
}

extern const Wide wide_few;
#ifdef NATIVE_HAS_AVX512VNNI
const Wide *const wide = &wide_few;
#else
const Wide *const wide = nullptr;
#endif

}  // namespace native
