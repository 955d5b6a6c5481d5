// What the parts of this library know of each other. No ggml here: kernels see plain memory.
//
// One product is y[m][n] = sum over k of x[m][k] * w[n][k]: x are activations in float32, one row for each position; w
// are weights as they lie in a GGUF file, one row of blocks for each output.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace native {

// What else shall become of some of a product's results while they are in the cache: `rows` x `columns` from `column` on.
struct Finish {
    virtual void block(float *y, size_t stride, int rows, int column, int columns) const = 0;

protected:
    ~Finish() = default;
};

struct Scratch;

struct Product {
    int type;            // of w, a ggml_type
    const char *w;       // columns rows of blocks
    size_t w_stride;     // bytes from row to row
    const float *x;      // rows x inner
    size_t x_stride;     // floats from row to row
    float *y;            // rows x columns
    size_t y_stride;     // floats from row to row
    int rows, columns, inner;
    const Finish *finish = nullptr;
};

// A way to compute products of many rows. Weights are unpacked once, a panel (some columns, one block of the inner
// dimension) at a time, and each panel meets all rows before the next one is unpacked: that is where the time goes, and
// why a prompt should come in one piece. Activations are packed once before, a tile (some rows) at a time.
struct Kernel {
    const char *name;
    bool (*works)();        // on this processor
    bool (*takes)(int type);
    int tile_rows;          // activations in a tile
    int panel_columns;      // weights in a panel
    int inner_block;        // inner values of both
    int block_panels;       // panels whose sums a thread keeps at once; what fits its second-level cache
    size_t tile_bytes;      // of a packed tile, with its scales; a multiple of 64
    size_t panel_bytes;     // likewise
    // rows <= tile_rows and inner <= inner_block are there to be read, the rest is taken for zero.
    void (*pack)(int type, const float *x, size_t stride, int rows, int inner, void *tile);
    void (*unpack)(const Product &, int column, int columns, int k, int inner, void *panel);
    // sums[tile_rows * panel_columns] = (first ? 0 : sums) + tile * panel, in the kernel's own order
    void (*multiply)(int type, const void *tile, const void *panel, int inner, bool first, float *sums);
    void (*store)(const float *sums, float *y, size_t stride, int rows, int columns);
    void (*enter)(void *), (*leave)(void *);  // around a thread's work, with 64 bytes to keep something; may be null
};

// Null-terminated.
extern const Kernel *const kernels[];

// Attention of one token block over a cache, for `heads` heads that share keys and values in groups.
// out[q][head][:] = softmax(scale * query . key + mask) . value, everything in float32 but keys, values and mask.
struct Attention {
    const char *q;  size_t q_row, q_head;      // float32; bytes from query to query, from head to head
    const char *k;  size_t k_row, k_head;      // float16
    const char *v;  size_t v_row, v_head;      // float16
    const char *mask;  size_t mask_row;        // float16, one row for each query; -infinity hides a key
    char *out;  size_t out_row, out_head;      // float32
    int queries, keys, heads, shared_heads, width;  // width: of a head
    float scale;
};

// A way to compute it for many queries.
struct ManyQueries {
    const char *name;
    bool (*works)();           // on this processor
    bool (*takes)(int width);  // of a head
    bool (*attend)(const Attention &, int threads, Scratch &);
};

extern const ManyQueries *const wide_attention;  // preferred; null where the compiler does not know the instructions

constexpr int FEW = 31;  // rows or queries: at most so many for multiply_few and attend_few

// Memory that is kept between calls and grows; all of a backend's calls come from one thread.
struct Scratch {
    char *data = nullptr;
    size_t size = 0;
    char *need(size_t bytes);  // null if there is none
    ~Scratch();
};

// Those who compute side by side: threads of OpenMP, as in llama.cpp, or of ONNX Runtime.
struct Team {
    const int size;
    virtual void run(void (*task)(void *, size_t), void *data) = 0;  // task(data, 0) to task(data, size - 1), then returns
    template <class F>
    void each(F with) {
        run([](void *data, size_t i) { (*static_cast<F *>(data))(int(i)); }, &with);
    }

protected:
    explicit Team(int members) : size(members) {}
    ~Team() = default;
};

struct OpenMp final : Team {
    explicit OpenMp(int threads) : Team(threads) {}
    void run(void (*task)(void *, size_t), void *data) override;
};

// Things in a row that a team shares. Each member takes some of those that are left when it is done with others, fewer towards
// the end: on a busy host the slowest member would be waited for.
struct Runs {
    const int all, members, most;  // most: to be taken at once
    std::atomic<int> next{0};

    // The first one of a run that ends before `end`; `all` if none are left.
    int take(int &end) {
        int first = next;
        do {
            end = std::min(all, first + std::clamp((all - first) / (2 * members), 1, most));
        } while (first < all && !next.compare_exchange_weak(first, end));
        return first;
    }
};

// They return false, with nothing computed, if there is no memory.
bool multiply(const Kernel &, const Product &, Team &, Scratch &);
bool multiply_few(const Product &, int threads, Scratch &);  // rows <= FEW
bool attend(const Attention &, int threads, Scratch &);
bool attend_by(const char *name, const Attention &, int threads, Scratch &);  // false, too, if that does not work here
bool attend_few(const Attention &, int threads, Scratch &);  // as exact, made for queries <= FEW

bool unpacks(int type);        // is it a type that kernels read?
int block_values(int type);    // how many values a block has
bool takes_few(int type, int64_t columns, int64_t inner);  // can few rows be multiplied with weights like these?
bool attends(int width);

}  // namespace native
