// The functions that Python calls: list kernels, configure the backend and, for tests, run a single kernel.
#include "backend.h"
#include "kernels.h"

#include <cstring>
#include <string>

#ifdef __x86_64__
#include <immintrin.h>
#endif

using namespace native;

static const Kernel *find(const char *name) {
    for (const Kernel *const *k = kernels; *k; k++)
        if (!strcmp((*k)->name, name) && (*k)->available()) return *k;
    return nullptr;
}

static Scratch scratch;  // the functions below are called from one thread

extern "C" {

#define EXPORT __attribute__((visibility("default")))

// Names of the kernels that this processor can run, preferred ones first, separated by spaces.
EXPORT const char *llava_edge_native_kernels() {
    static const std::string names = [] {
        std::string all;
        for (const Kernel *const *k = kernels; *k; k++)
            if ((*k)->available()) all += (all.empty() ? "" : " ") + std::string((*k)->name);
        return all;
    }();
    return names.c_str();
}

// Set which operations the backend accepts. many, min_rows: for each ggml_type the kernel for products of at least so many
// rows, as an index into the names above (negative: none). few: bits 1 << ggml_type, types whose products of fewer rows, at most
// MAX_FEW, are accepted. attention, few_attention: with more queries than MAX_FEW, and with at most so many.
// Returns 0, with nothing changed, if a kernel does not support a type or there is no attention.
EXPORT int llava_edge_native_configure(const int8_t *many, const uint8_t *min_rows, uint64_t few, int attention,
                                       int few_attention) {
    Configuration config{{}, {}, few, attention != 0, few_attention != 0};
    if ((attention || few_attention) && !supports_width(64)) return 0;
    for (int type = 0; type < TYPES; type++) {
        if (few >> type & 1 && !supports_few(type, 1, block_values(type))) return 0;
        if (many[type] < 0) continue;
        int number = many[type];
        config.min_rows[type] = min_rows[type];
        const Kernel *const *k = kernels;
        while (*k && (!(*k)->available() || number-- > 0)) k++;
        if (!*k || !(*k)->supports(type)) return 0;
        config.kernel[type] = *k;
    }
    configure(config);
    return 1;
}

EXPORT void llava_edge_native_set_threads(int threads) { set_own_threads(threads); }

// Evict memory from the caches: a model's weights are read from memory, so a benchmark must not find them in a cache.
EXPORT void llava_edge_native_evict(const char *memory, size_t bytes) {
#ifdef __x86_64__
    for (const char *line = memory; line < memory + bytes; line += 64) _mm_clflush(line);
    if (bytes) _mm_clflush(memory + bytes - 1);
    _mm_mfence();
#else
    (void)memory, (void)bytes;
#endif
}

// Compute one product; "few" names the kernel for few rows.
EXPORT int llava_edge_native_multiply(const char *kernel, int type, const char *w, const float *x, float *y, int rows,
                                      int columns, int inner, size_t w_stride, int threads) {
    const Product p{type, w, w_stride, x, size_t(inner), y, size_t(columns), rows, columns, inner};
    if (!strcmp(kernel, "few")) return rows <= MAX_FEW && supports_few(type, columns, inner) && multiply_few(p, threads, scratch);
    const Kernel *k = find(kernel);
    OpenMp team(threads);
    return k && k->supports(type) && inner % block_values(type) == 0 && multiply(*k, p, team, scratch);
}

// Compute one attention. name: "few", or the instruction set of a kernel for many queries.
EXPORT int llava_edge_native_attend(const char *name, const Attention *a, int threads) {
    if (!strcmp(name, "few")) return supports_width(a->width) && attend_few(*a, threads, scratch);
    return attend_by(name, *a, threads, scratch);
}
}
