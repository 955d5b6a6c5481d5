// Instructions of the matrix unit (AMX).
//
// Eight tile registers of 16 rows of 64 bytes: 0 to 3 are accumulators, 4 and 5 hold first operands, 6 and 7 second ones. gcc's
// intrinsics do not declare that they access memory; these do.
#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>

namespace native {
namespace {

struct TileConfiguration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(TileConfiguration) == 64);

template <int T>
inline void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void *p, size_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void *p, size_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
enum ElementType { BFLOAT16, INT8 };
template <ElementType N, int C, int A, int B>
inline void tile_multiply() {
    if (N == BFLOAT16) __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    else __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

inline void tile_configure(const TileConfiguration *c) { __asm__ volatile("ldtilecfg %0" ::"m"(*c) : "memory"); }
inline void tile_read_configuration(TileConfiguration *c) { __asm__ volatile("sttilecfg %0" : "=m"(*c)::"memory"); }
inline void tile_release() { __asm__ volatile("tilerelease" ::: "memory"); }

// Tiles 0 to 3 += two tiles of `a` times two of `b`, over one or more steps. Under hyper-threading or on a busy host
// out-of-order execution does not overlap loads and products enough, so loads are software-pipelined: a tile is loaded
// for the next step right after its last product of this one, and activations (`streamed`: a or b) are prefetched from the L2
// cache before that: 1.16 to 1.18 times as fast as loads before products (Xeon with AMX, 16 threads).
template <ElementType N, class Step>
inline void multiply_steps(const Step *a, const Step *b, int steps, const Step *streamed) {
    static_assert(sizeof(Step) == 2048);
    const char *later = reinterpret_cast<const char *>(streamed + 2);  // at the end, past the last step
    const auto prefetch = [&later] {
        for (int i = 0; i < 512; i += 64) _mm_prefetch(later + i, _MM_HINT_T0);
        later += 512;
    };
    tile_load<4>(a->tile[0], 64), tile_load<6>(b->tile[0], 64), tile_load<7>(b->tile[1], 64), tile_load<5>(a->tile[1], 64);
    for (int s = 1; s < steps; s++) {
        tile_multiply<N, 0, 4, 6>(), prefetch();
        tile_multiply<N, 1, 4, 7>(), tile_load<4>(a[s].tile[0], 64), prefetch();
        tile_multiply<N, 2, 5, 6>(), tile_load<6>(b[s].tile[0], 64), prefetch();
        tile_multiply<N, 3, 5, 7>(), tile_load<7>(b[s].tile[1], 64), tile_load<5>(a[s].tile[1], 64), prefetch();
    }
    tile_multiply<N, 0, 4, 6>(), tile_multiply<N, 1, 4, 7>(), tile_multiply<N, 2, 5, 6>(), tile_multiply<N, 3, 5, 7>();
}

// AVX-512 as the compiler may use it: all processors with AMX have it, but a virtual machine may hide it.
inline bool has_avx512() {
#ifdef __AVX512BF16__
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
#else
    return true;  // tests, on other processors
#endif
}

// leaf 7: 22 bf16, 24 tiles, 25 int8. Linux must be asked for permission to use the registers' 8 KB per thread.
inline bool has_amx(int needed) {
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl
    unsigned a, b, c, d;
    const bool there = has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 24 & 1 && d >> needed & 1;
    const bool granted = there && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#ifdef NATIVE_REFUSED_COMPUTED  // tests: emulated
    return true;
#endif
    return granted;
}

constexpr int BF16_BIT = 22, INT8_BIT = 25;

// Around a thread's work, because ggml's kernels configure the unit once per thread and rely on that.
inline void configure_tiles(void *saved) {
    tile_read_configuration(static_cast<TileConfiguration *>(saved));
    TileConfiguration all{};
    all.palette = 1;
    for (int t = 0; t < 8; t++) all.row_bytes[t] = 64, all.rows[t] = 16;
    tile_configure(&all);
}

inline void restore_tiles(void *saved) {
    const TileConfiguration *before = static_cast<const TileConfiguration *>(saved);
    if (before->palette) tile_configure(before);
    else tile_release();
}

}  // namespace
}  // namespace native
