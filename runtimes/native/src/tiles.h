// The matrix unit's instructions (AMX), and plain C++ in their place where NATIVE_EMULATE asks for it: for tests.
//
// Eight registers of 16 rows of 64 bytes. 0 to 3 are sums, 4 and 5 hold weights, 6 and 7 activations. gcc's own intrinsics
// do not say that they read and write memory; here everything does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifndef NATIVE_EMULATE
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace native {
namespace {

struct TileConfiguration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(TileConfiguration) == 64);

#ifndef NATIVE_EMULATE

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
template <int C, int A, int B>
inline void tile_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
inline void tile_int8() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
inline void tile_configure(const TileConfiguration *c) { __asm__ volatile("ldtilecfg %0" ::"m"(*c) : "memory"); }
inline void tile_read_configuration(TileConfiguration *c) { __asm__ volatile("sttilecfg %0" : "=m"(*c)::"memory"); }
inline void tile_release() { __asm__ volatile("tilerelease" ::: "memory"); }

// leaf 7: 22 bf16, 24 tiles, 25 int8. The kernel grants the registers' 8 KB per thread when it is asked for them.
inline bool tiles_work(int needed) {
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> needed & 1)) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

#else

struct EmulatedTiles {
    uint8_t bytes[8][16][64];
    TileConfiguration configuration;
};
thread_local EmulatedTiles emulated;  // zero: not configured

inline int rows_of(int t) { return emulated.configuration.rows[t]; }
inline int bytes_of(int t) { return emulated.configuration.row_bytes[t]; }

template <int T>
inline void tile_zero() {
    memset(emulated.bytes[T], 0, sizeof emulated.bytes[T]);
}
template <int T>
inline void tile_load(const void *p, size_t stride) {
    tile_zero<T>();
    for (int r = 0; r < rows_of(T); r++)
        memcpy(emulated.bytes[T][r], static_cast<const char *>(p) + r * stride, bytes_of(T));
}
template <int T>
inline void tile_store(void *p, size_t stride) {
    for (int r = 0; r < rows_of(T); r++) memcpy(static_cast<char *>(p) + r * stride, emulated.bytes[T][r], bytes_of(T));
}
template <int C, int A, int B>
inline void tile_bf16() {  // c[m][n] += a[m][2k] * b[k][2n] + a[m][2k + 1] * b[k][2n + 1]
    const auto value = [](const uint8_t *p) {
        const uint32_t bits = uint32_t(p[1]) << 24 | uint32_t(p[0]) << 16;
        float f;
        memcpy(&f, &bits, 4);
        return f;
    };
    for (int m = 0; m < rows_of(C); m++)
        for (int n = 0; n < bytes_of(C) / 4; n++) {
            float sum;
            memcpy(&sum, &emulated.bytes[C][m][4 * n], 4);
            for (int k = 0; k < bytes_of(A) / 4; k++)
                for (int i = 0; i < 4; i += 2)
                    sum += value(&emulated.bytes[A][m][4 * k + i]) * value(&emulated.bytes[B][k][4 * n + i]);
            memcpy(&emulated.bytes[C][m][4 * n], &sum, 4);
        }
}
template <int C, int A, int B>
inline void tile_int8() {  // c[m][n] += sum over i of a[m][4k + i] * b[k][4n + i]
    for (int m = 0; m < rows_of(C); m++)
        for (int n = 0; n < bytes_of(C) / 4; n++) {
            int32_t sum;
            memcpy(&sum, &emulated.bytes[C][m][4 * n], 4);
            for (int k = 0; k < bytes_of(A) / 4; k++)
                for (int i = 0; i < 4; i++)
                    sum += int8_t(emulated.bytes[A][m][4 * k + i]) * int8_t(emulated.bytes[B][k][4 * n + i]);
            memcpy(&emulated.bytes[C][m][4 * n], &sum, 4);
        }
}
inline void tile_configure(const TileConfiguration *c) {
    emulated.configuration = *c;
    memset(emulated.bytes, 0, sizeof emulated.bytes);
}
inline void tile_read_configuration(TileConfiguration *c) { *c = emulated.configuration; }
inline void tile_release() { emulated.configuration = {}; }
inline bool tiles_work(int) { return true; }

#endif

constexpr int BF16_BIT = 22, INT8_BIT = 25;

// Around a thread's work: ggml's own kernels configure the unit once per thread and rely on finding it so.
inline void enter_tiles(void *kept) {
    tile_read_configuration(static_cast<TileConfiguration *>(kept));
    TileConfiguration all{};
    all.palette = 1;
    for (int t = 0; t < 8; t++) all.row_bytes[t] = 64, all.rows[t] = 16;
    tile_configure(&all);
}

inline void leave_tiles(void *kept) {
    const TileConfiguration *before = static_cast<const TileConfiguration *>(kept);
    if (before->palette) tile_configure(before);
    else tile_release();
}

}  // namespace
}  // namespace native
