// Computes products that it reads from stdin, for test_native_arm.py: without an argument it says which kernels work here.
//
// A product is six int32 (ggml_type, rows, columns, inner, bytes of a row of weights, threads), the weights, the activations;
// its answer one int32 (was it taken), then rows x columns floats. What is read and written ends where a page ends that
// nobody may touch, so that a kernel that goes too far dies.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>

extern "C" {
const char *llava_edge_native_kernels();
int llava_edge_native_multiply(const char *kernel, int type, const char *w, const float *x, float *y, int rows, int columns,
                               int inner, size_t w_stride, int threads);
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

int main(int count, char **arguments) {
    if (count < 2) return puts(llava_edge_native_kernels()) < 0;
    int32_t p[6];
    while (fread(p, sizeof p, 1, stdin) == 1) {
        const auto [type, rows, columns, inner, stride, threads] = p;
        const Guarded w(size_t(columns) * stride), x(4 * size_t(rows) * inner), y(4 * size_t(rows) * columns);
        if (!w.read() || !x.read()) return 1;
        const int32_t done = llava_edge_native_multiply(arguments[1], type, w.data, x.floats(), y.floats(), rows, columns,
                                                        inner, stride, threads);
        fwrite(&done, sizeof done, 1, stdout);
        fwrite(y.data, 1, y.size, stdout);
    }
    return 0;
}
