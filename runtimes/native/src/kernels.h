// The interface between the parts of this library. Independent of ggml: kernels work on plain memory.
//
// A product is y[m][n] = sum over k of x[m][k] * w[n][k]. x: float32 activations, one row per position; w: weights in GGUF's
// memory layout, one row of blocks per output.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace native {

// Applied to a product's results while they are in the cache: to a block of `rows` x `columns` from `column` on.
struct Epilogue {
    virtual void block(float *y, size_t stride, int rows, int column, int columns) const = 0;

protected:
    ~Epilogue() = default;
};

struct Scratch;

struct Product {
    int type;            // ggml_type of w
    const char *w;       // columns rows of blocks
    size_t w_stride;     // bytes from row to row
    const float *x;      // rows x inner
    size_t x_stride;     // floats from row to row
    float *y;            // rows x columns
    size_t y_stride;     // floats from row to row
    int rows, columns, inner;
    const Epilogue *epilogue = nullptr;
};

// A kernel for products of many rows. Weights are unpacked a panel (some columns, one block of the inner dimension) at a time,
// and each panel is multiplied with all rows before the next one is unpacked. Unpacking is expensive, which is why a prompt
// should be evaluated in one batch. Activations are packed once beforehand, a tile (some rows) at a time.
struct Kernel {
    const char *name;
    bool (*available)();        // on this processor
    bool (*supports)(int type);
    int tile_rows;          // rows of activations in a tile
    int panel_columns;      // columns of weights in a panel
    int inner_block;        // inner dimension of both
    int block_panels;       // panels whose accumulators a thread keeps at once, so that they fit the L2 cache
    size_t tile_bytes;      // size of a packed tile with its scales; a multiple of 64
    size_t panel_bytes;     // likewise
    // Only rows <= tile_rows and inner <= inner_block are read; the rest of the tile or panel is zero.
    void (*pack)(int type, const float *x, size_t stride, int rows, int inner, void *tile);
    void (*unpack)(const Product &, int column, int columns, int k, int inner, void *panel);
    // sums[tile_rows * panel_columns] = (first ? 0 : sums) + tile * panel, in a layout of the kernel's own
    void (*multiply)(int type, const void *tile, const void *panel, int inner, bool first, float *sums);
    void (*store)(const float *sums, float *y, size_t stride, int rows, int columns);
    void (*begin_thread)(void *), (*end_thread)(void *);  // get 64 bytes to save state in; may be null
};

// Those for GGUF's types; null-terminated.
extern const Kernel *const kernels[];

// For INT8_TRANSPOSED, preferred to int16.cpp's; null if the compiler lacks the instructions.
extern const Kernel *const transposed_int8;

// Grouped-query attention of a batch of queries over the KV cache.
// out[q][head][:] = softmax(scale * query . key + mask) . value, in float32 except for keys, values and mask.
struct Attention {
    const char *q;  size_t q_row, q_head;      // float32; bytes from query to query, from head to head
    const char *k;  size_t k_row, k_head;      // float16 or Q8_0
    const char *v;  size_t v_row, v_head;      // likewise
    const char *mask;  size_t mask_row;        // float16, one row per query; -infinity masks a key
    char *out;  size_t out_row, out_head;      // float32
    int queries, keys, heads, kv_heads, width;  // width of a head
    float scale;
    int eight_bits;  // keys and values are Q8_0, with a width that is a multiple of its blocks'
};

// A kernel for attention with many queries.
struct AttentionKernel {
    const char *name;
    bool (*available)();           // on this processor
    bool (*supports)(int width);  // head width
    bool (*attend)(const Attention &, int threads, Scratch &);
};

extern const AttentionKernel *const wide_attention;  // preferred; null if the compiler lacks the instructions

constexpr int MAX_FEW = 31;  // maximum rows of multiply_few and queries of attend_few

// Scratch memory that is reused between calls and only grows. Not thread-safe: a backend is called from one thread.
struct Scratch {
    char *data = nullptr;
    size_t size = 0;
    char *reserve(size_t bytes);  // null if out of memory
    ~Scratch();
};

// A team of threads: OpenMP's, as in llama.cpp, or ONNX Runtime's.
struct Team {
    const int size;
    virtual void run(void (*task)(void *, size_t), void *data) = 0;  // returns after task(data, 0..size - 1)
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

// A range of items that a team shares by guided scheduling: each member takes chunks that get smaller towards the end, so that
// on a busy host the others do not wait long for the slowest one.
struct GuidedRange {
    const int size, members, max_chunk;
    std::atomic<int> next{0};

    // First item of the next chunk, which ends before `end`; `size` if none are left.
    int next_chunk(int &end) {
        int first = next;
        do {
            end = std::min(size, first + std::clamp((size - first) / (2 * members), 1, max_chunk));
        } while (first < size && !next.compare_exchange_weak(first, end));
        return first;
    }
};

// Return false, with nothing computed, if out of memory.
bool multiply(const Kernel &, const Product &, Team &, Scratch &);
bool multiply_few(const Product &, int threads, Scratch &);  // rows <= FEW
bool attend(const Attention &, int threads, Scratch &);
bool attend_by(const char *name, const Attention &, int threads, Scratch &);  // false, too, if it is not available
bool attend_few(const Attention &, int threads, Scratch &);  // queries <= MAX_FEW

bool is_supported_type(int type);        // whether kernels can unpack it
int block_values(int type);    // values per block
bool supports_few(int type, int64_t columns, int64_t inner);  // for multiply_few
bool supports_width(int width);

}  // namespace native
