// CLIP's attention: out = softmax(q . k / sqrt(width)) . v for each head, where every position attends to all.
//
// Both products use int16.cpp's kernel. A thread computes a head: it packs the keys and values once, as if they were
// weights, and then processes one tile of queries at a time: their scores (9 KB for 4 queries and 577 keys, 18 for 8 with AVX-512)
// stay in the L1 cache, the packed keys and values in the L2 cache. ONNX Runtime's nodes write and read the scores
// of all heads: 21 MB per layer.

#include <atomic>
#include <cmath>

#include "attention.h"
#include "formats.h"
#include "operators.h"
#include "rounding.h"

namespace native {
namespace {

constexpr int STEP = 32;   // keys are padded to a multiple of it
constexpr int BLOCK = 64;  // keys whose weights (13 bits) and values (12 bits) share a scale each
constexpr int MAX_POSITIONS = 1 << 14, MAX_WIDTH = 256;

// 2^x for x <= 0, at least 2^-120; relative error below 3e-6, which is lost in rounding to 13 bits. NaN stays NaN.
__m256 power_of_two(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(-120), x);
    const __m256 n = _mm256_round_ps(x, 8), r = _mm256_sub_ps(x, n);
    __m256 p = _mm256_set1_ps(9.57010221e-3f);  // 2^r, with the least largest relative error for |r| <= 1/2
    for (float c : {5.59178591e-2f, 0.240247443f, 0.693121791f, 0.999999285f}) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}

size_t up(size_t a, size_t b) { return (a + b - 1) / b; }
size_t up64(size_t bytes) { return up(bytes, 64) * 64; }

// Buffers of one thread for one head.
struct Head {
    const Bidirectional &a;
    const Kernel &kernel;
    const size_t row = size_t(3) * a.heads * a.width;                         // floats from position to position
    const size_t stride = up(a.positions, STEP) * STEP;                       // floats of a query's scores
    const size_t blocks = up(stride, BLOCK);
    const size_t key_panels = stride / kernel.panel_columns, value_panels = up(a.width, kernel.panel_columns);
    const size_t keys_size = key_panels * kernel.panel_bytes, values_size = value_panels * blocks * kernel.panel_bytes;
    const size_t tiles_size = (1 + blocks) * kernel.tile_bytes;
    const size_t sums_size = up64(size_t(kernel.tile_rows) * kernel.panel_columns * sizeof(float));
    const size_t scores_size = up64(kernel.tile_rows * stride * sizeof(float));
    const size_t turned_size = up64(a.width * stride * sizeof(float));

    size_t size() const { return keys_size + values_size + tiles_size + sums_size + scores_size + turned_size; }

    int block(size_t b) const { return int(std::min(size_t(BLOCK), stride - b * BLOCK)); }

    void compute(int batch, int head, char *memory) const {
        char *const keys = memory, *const values = keys + keys_size, *const tiles = values + values_size;
        float *const sums = reinterpret_cast<float *>(tiles + tiles_size);
        float *const scores = sums + sums_size / sizeof(float), *const transposed = scores + scores_size / sizeof(float);
        const float *const q = a.qkv + size_t(batch) * a.positions * row + size_t(head) * a.width;
        const float *const k = q + size_t(a.heads) * a.width, *const v = k + size_t(a.heads) * a.width;
        float *const out = a.out + size_t(batch) * a.positions * (row / 3) + size_t(head) * a.width;
        pack_keys(k, keys);
        pack_values(v, transposed, values);
        for (int first = 0; first < a.positions; first += kernel.tile_rows) {
            const int rows = std::min(kernel.tile_rows, a.positions - first);
            float inverse[MAX_ROWS];
            score(q + first * row, rows, keys, tiles, sums, scores);
            for (int i = 0; i < rows; i++) inverse[i] = softmax(scores + i * stride);
            weigh(rows, values, tiles, sums, scores, out + first * (row / 3), inverse);
        }
    }

private:
    static constexpr int MAX_ROWS = 8;

    static Product weights(const float *w, size_t w_stride, int columns, int inner) {
        Product p{};
        p.type = F32, p.w = reinterpret_cast<const char *>(w), p.w_stride = w_stride * sizeof(float);
        p.columns = columns, p.inner = inner;
        return p;
    }

    void pack_keys(const float *k, char *panels) const {
        const Product p = weights(k, row, a.positions, a.width);
        for (size_t n = 0; n < key_panels; n++) {
            const int column = int(n) * kernel.panel_columns;
            const int columns = std::clamp(a.positions - column, 0, kernel.panel_columns);
            kernel.unpack(p, column, columns, 0, a.width, panels + n * kernel.panel_bytes);
        }
    }

    // Transposed first: the elements of a value are the columns of that product.
    void pack_values(const float *v, float *transposed, char *panels) const {
        int position = 0;
        for (; position + 8 <= a.positions; position += 8)
            for (int d = 0; d < a.width; d += 8)
                transpose(reinterpret_cast<const int32_t *>(v + position * row + d), row,
                          reinterpret_cast<int32_t *>(transposed + d * stride + position), stride);
        for (int d = 0; d < a.width; d++)
            for (int t = position; t < int(stride); t++) transposed[d * stride + t] = t < a.positions ? v[t * row + d] : 0;
        const Product p = weights(transposed, stride, a.width, int(stride));
        for (size_t n = 0; n < value_panels; n++)
            for (size_t b = 0; b < blocks; b++, panels += kernel.panel_bytes) {
                const int column = int(n) * kernel.panel_columns;
                const int columns = std::min(kernel.panel_columns, a.width - column);
                kernel.unpack(p, column, columns, int(b) * BLOCK, block(b), panels);
            }
    }

    void score(const float *q, int rows, const char *panels, char *tile, float *sums, float *scores) const {
        kernel.pack(F32, q, row, rows, a.width, tile);
        for (size_t n = 0; n < key_panels; n++) {
            kernel.multiply(F32, tile, panels + n * kernel.panel_bytes, a.width, true, sums);
            kernel.store(sums, scores + n * kernel.panel_columns, stride, rows, kernel.panel_columns);
        }
    }

    // Scores -> e^((score - maximum) / sqrt(width)), in place; returns one over their sum. NaN stays NaN.
    float softmax(float *scores) const {
        std::fill(scores + a.positions, scores + stride, -INFINITY);
        __m256 maxima = _mm256_loadu_ps(scores), sum = _mm256_setzero_ps();
        for (size_t j = 8; j < stride; j += 8) maxima = _mm256_max_ps(maxima, _mm256_loadu_ps(scores + j));
        const __m256 maximum = _mm256_set1_ps(Float8{maxima}.reduce_max());
        const __m256 scale = _mm256_set1_ps(1.44269504f / std::sqrt(float(a.width)));
        for (size_t j = 0; j < stride; j += 8) {
            const __m256 e = power_of_two(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(scores + j), maximum), scale));
            _mm256_storeu_ps(scores + j, e);
            sum = _mm256_add_ps(sum, e);
        }
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return 1 / _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }

    void weigh(int rows, const char *panels, char *tiles, float *sums, const float *scores, float *out,
               const float *inverse) const {
        for (size_t b = 0; b < blocks; b++)
            kernel.pack(F32, scores + b * BLOCK, stride, rows, block(b), tiles + b * kernel.tile_bytes);
        for (size_t n = 0; n < value_panels; n++) {
            for (size_t b = 0; b < blocks; b++, panels += kernel.panel_bytes)
                kernel.multiply(F32, tiles + b * kernel.tile_bytes, panels, block(b), b == 0, sums);
            const int column = int(n) * kernel.panel_columns;
            kernel.store(sums, out + column, row / 3, rows, std::min(kernel.panel_columns, a.width - column));
        }
        for (int i = 0; i < rows; i++)
            for (int d = 0; d < a.width; d++) out[i * (row / 3) + d] *= inverse[i];
    }
};

}  // namespace

bool supports_bidirectional(int64_t positions, int64_t width) {
    return positions > 0 && positions <= MAX_POSITIONS && width > 0 && width % 16 == 0 && width <= MAX_WIDTH;
}

bool attend_bidirectional(const Bidirectional &a, Team &team) {
    const Kernel *const kernel = int16_kernel();
    if (!kernel) return false;
    const Head work{a, *kernel};
    char *memory = scratch().reserve(team.size * work.size());
    if (!memory) return false;
    std::atomic<int> next{0};
    team.each([&](int member) {
        for (int i; (i = next.fetch_add(1)) < a.batch * a.heads;)
            work.compute(i / a.heads, i % a.heads, memory + member * work.size());
    });
    return true;
}

}  // namespace native

// For tests and the check.
extern "C" EXPORT int llava_edge_native_attend(const float *qkv, float *out, int batch, int positions, int heads, int width,
                                               int threads) {
    using namespace native;
    if (!supports_bidirectional(positions, width)) return false;
    TemporaryThreads team(threads);
    return attend_bidirectional({qkv, out, batch, positions, heads, width}, team);
}
