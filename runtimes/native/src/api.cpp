// What Python calls: which kernels there are, what the backend may use, and each kernel alone, for tests.
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
        if (!strcmp((*k)->name, name) && (*k)->works()) return *k;
    return nullptr;
}

static Scratch scratch;  // for calls from one thread

extern "C" {

#define EXPORT __attribute__((visibility("default")))

// Names of the kernels that work on this processor, preferred ones first, with spaces between them.
EXPORT const char *llava_edge_native_kernels() {
    static const std::string names = [] {
        std::string all;
        for (const Kernel *const *k = kernels; *k; k++)
            if ((*k)->works()) all += (all.empty() ? "" : " ") + std::string((*k)->name);
        return all;
    }();
    return names.c_str();
}

// What the backend takes from now on: of each type products of `least` rows or more by the kernel with that number in the list
// of names above (negative: none), and of fewer, up to FEW, if its bit (1 << ggml_type) is set in `few`; attention of more
// queries than FEW, and of fewer. Returns 0, with nothing changed, if a kernel does not take a type or there is no attention.
EXPORT int llava_edge_native_configure(const int8_t *many, const uint8_t *least, uint64_t few, int attention, int few_attention) {
    Use wanted{{}, {}, few, attention != 0, few_attention != 0};
    if ((attention || few_attention) && !attends(64)) return 0;
    for (int type = 0; type < TYPES; type++) {
        if (few >> type & 1 && !takes_few(type, 1, block_values(type))) return 0;
        if (many[type] < 0) continue;
        int number = many[type];
        wanted.least[type] = least[type];
        const Kernel *const *k = kernels;
        while (*k && (!(*k)->works() || number-- > 0)) k++;
        if (!*k || !(*k)->takes(type)) return 0;
        wanted.kernel[type] = *k;
    }
    use(wanted);
    return 1;
}

// Out of the caches: weights of a model are read from memory, and a race over some that lie in caches says little of that.
EXPORT void llava_edge_native_evict(const char *memory, size_t bytes) {
#ifdef __x86_64__
    for (const char *line = memory; line < memory + bytes; line += 64) _mm_clflush(line);
    if (bytes) _mm_clflush(memory + bytes - 1);
    _mm_mfence();
#else
    (void)memory, (void)bytes;
#endif
}

// One product; the kernel "few" is the one for few rows.
EXPORT int llava_edge_native_multiply(const char *kernel, int type, const char *w, const float *x, float *y, int rows,
                                      int columns, int inner, size_t w_stride, int threads) {
    const Product p{type, w, w_stride, x, size_t(inner), y, size_t(columns), rows, columns, inner};
    if (!strcmp(kernel, "few")) return rows <= FEW && takes_few(type, columns, inner) && multiply_few(p, threads, scratch);
    const Kernel *found = find(kernel);
    OpenMp team(threads);
    return found && found->takes(type) && inner % block_values(type) == 0 && multiply(*found, p, team, scratch);
}

// The same for attention, of many queries by the instructions that it uses.
EXPORT int llava_edge_native_attend(const char *name, const Attention *a, int threads) {
    if (!strcmp(name, "few")) return attends(a->width) && attend_few(*a, threads, scratch);
    return attend_by(name, *a, threads, scratch);
}
}
