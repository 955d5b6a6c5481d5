// Whether this processor has the instructions that the compiler's flags allow a file.
#pragma once

namespace native {
namespace {

inline bool works() {
    __builtin_cpu_init();
#if defined(NATIVE_WIDE) && defined(__AVX512VNNI__)
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(NATIVE_WIDE)
    return true;
#elif defined(__AVXVNNI__)
    return __builtin_cpu_supports("avxvnni");
#else
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
}

}  // namespace
}  // namespace native
