// Computes what it reads from stdin, for emulator.py: without an argument it says which kernels work here. What is read and written
// ends where a page begins that nobody may touch, so that a kernel that goes too far dies.
//
// KERNEL: products. Each is six int32 (ggml_type, rows, columns, inner, bytes of a row of weights, threads), the weights, the
// activations; its answer one int32 (was it taken), then rows x columns floats.
// attention WAY: attentions. Each is seven int32 (heads, shared heads, queries, keys, width, threads, bytes of a key), queries
// [head][query][width] in float32, keys and values [head][key] in float16 or Q8_0 and the mask [query][key] in float16; its
// answer likewise, then queries x heads x width floats.

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "kernels.h"

extern "C" {
const char *llava_edge_native_kernels();
int llava_edge_native_multiply(const char *kernel, int type, const char *w, const float *x, float *y, int rows, int columns,
                               int inner, size_t w_stride, int threads);
int llava_edge_native_attend(const char *name, const native::Attention *a, int threads);
}

struct Guarded {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), size, mapped;
    char *base, *data;

    explicit Guarded(size_t bytes) : size(bytes), mapped((bytes + page - 1) / page * page + page) {
        base = static_cast<char *>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        mprotect(base + mapped - page, page, PROT_NONE);
        data = base + mapped - page - bytes;
    }
    ~Guarded() { munmap(base, mapped); }
    bool read() const { return fread(data, 1, size, stdin) == size; }
    float *floats() const { return reinterpret_cast<float *>(data); }
};

void answer(int32_t taken, const Guarded &values) {
    fwrite(&taken, sizeof taken, 1, stdout);
    fwrite(values.data, 1, values.size, stdout);
    fflush(stdout);
}

int attend(const char *way) {
    int32_t p[7];
    while (fread(p, sizeof p, 1, stdin) == 1) {
        const auto [heads, shared, queries, keys, width, threads, cached] = p;
        const size_t row = cached, values = row * shared * keys, floats = 4 * size_t(width);
        const Guarded q(floats * heads * queries), k(values), v(values), mask(2 * size_t(queries) * keys), out(q.size);
        if (!q.read() || !k.read() || !v.read() || !mask.read()) return 1;
        const native::Attention a{q.data, floats, floats * queries, k.data, row, row * keys, v.data, row, row * keys,
                                  mask.data, 2 * size_t(keys), out.data, floats * heads, floats,
                                  queries, keys, heads, shared, width, 1 / std::sqrt(float(width)), cached != 2 * width};
        answer(llava_edge_native_attend(way, &a, threads), out);
    }
    return 0;
}

int main(int count, char **arguments) {
    if (count < 2) return puts(llava_edge_native_kernels()) < 0;
    if (!strcmp(arguments[1], "attention")) return attend(arguments[2]);
    int32_t p[6];
    while (fread(p, sizeof p, 1, stdin) == 1) {
        const auto [type, rows, columns, inner, stride, threads] = p;
        const Guarded w(size_t(columns) * stride), x(4 * size_t(rows) * inner), y(4 * size_t(rows) * columns);
        if (!w.read() || !x.read()) return 1;
        answer(llava_edge_native_multiply(arguments[1], type, w.data, x.floats(), y.floats(), rows, columns, inner, stride,
                                          threads), y);
    }
    return 0;
}
