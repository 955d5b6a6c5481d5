// Whether this processor has the instructions that a file is compiled for, and their name: INSTRUCTIONS in the name of the
// kernel, KERNEL(x) in C++.
#pragma once

#ifndef __x86_64__
#include <sys/auxv.h>
#endif

#if defined(__AVX512VNNI__)
#define INSTRUCTIONS "avx512vnni"
#define KERNEL(kind) kind##_avx512vnni
#elif defined(__AVXVNNI__)
#define INSTRUCTIONS "avxvnni"
#define KERNEL(kind) kind##_avxvnni
#elif defined(__x86_64__)
#define INSTRUCTIONS "avx2"
#define KERNEL(kind) kind##_avx2
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#define INSTRUCTIONS "i8mm"
#define KERNEL(kind) kind##_i8mm
#elif defined(__ARM_FEATURE_DOTPROD)
#define INSTRUCTIONS "dotprod"
#define KERNEL(kind) kind##_dotprod
#else
#define INSTRUCTIONS "neon"
#define KERNEL(kind) kind##_neon
#endif

namespace native {
namespace {

inline bool available() {
#ifdef __x86_64__
    __builtin_cpu_init();
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return getauxval(AT_HWCAP2) >> 13 & 1;  // HWCAP2_I8MM, which older headers lack
#elif defined(__ARM_FEATURE_DOTPROD)
    return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif !defined(__x86_64__)
    return true;  // every aarch64 has NEON
#elif defined(NATIVE_REFUSED_COMPUTED)
    return true;  // tests: in plain C++, or emulated
#elif defined(__AVX512VNNI__)
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVXVNNI__)
    return __builtin_cpu_supports("avxvnni");
#else
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
}

}  // namespace
}  // namespace native
