// Driver of products of many rows, for any kernel.
//
// The team packs the activations, then each member computes blocks of panels until none are left. Within a block the K loop is
// outermost, so that the packed activations of one inner block are read from the L2 cache for all panels but the first.

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "formats.h"
#include "kernels.h"

namespace native {

char *Scratch::reserve(size_t bytes) {
    if (bytes <= size) return data;
    constexpr size_t PAGE = 2 << 20;  // transparent huge pages
    const size_t rounded = (bytes + PAGE - 1) / PAGE * PAGE;
    void *mapping = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) return nullptr;
    madvise(mapping, rounded, MADV_HUGEPAGE);
    if (data) munmap(data, size);
    data = static_cast<char *>(mapping);
    size = rounded;
    return data;
}

Scratch::~Scratch() {
    if (data) munmap(data, size);
}

namespace {

constexpr int MAX_SUMS = 32 * 32;  // maximum of all kernels

int ceil_div(int a, int b) { return (a + b - 1) / b; }
size_t round_up_64(size_t bytes) { return (bytes + 63) / 64 * 64; }

struct Plan {
    const Kernel &kernel;
    const Product &p;
    const int tiles;
    char *const packed;  // [inner block][tile]

    int inner(int k) const { return std::min(kernel.inner_block, p.inner - k); }
    char *tile(int k, int t) const { return packed + (size_t(k / kernel.inner_block) * tiles + t) * kernel.tile_bytes; }
    size_t sums() const { return size_t(kernel.tile_rows) * kernel.panel_columns; }

    void pack(int t) const {
        const int row = t * kernel.tile_rows, rows = std::min(kernel.tile_rows, p.rows - row);
        for (int k = 0; k < p.inner; k += kernel.inner_block)
            kernel.pack(p.type, p.x + row * p.x_stride + k, p.x_stride, rows, inner(k), tile(k, t));
    }

    // sums: [panel of the block][tile]
    void block(int first_panel, int end_panel, char *panel, float *const sums_of_all) const {
        const int first = first_panel * kernel.panel_columns, end = std::min(end_panel * kernel.panel_columns, p.columns);
        for (int k = 0; k < p.inner; k += kernel.inner_block) {
            float *s = sums_of_all;
            for (int n = first; n < end; n += kernel.panel_columns) {
                const int width = std::min(kernel.panel_columns, end - n);
                kernel.unpack(p, n, width, k, inner(k), panel);
                for (int t = 0; t < tiles; t++, s += sums()) {
                    kernel.multiply(p.type, tile(k, t), panel, inner(k), k == 0, s);
                    if (k + inner(k) == p.inner) store(s, t, n, width);
                }
            }
        }
    }

    void store(const float *s, int t, int column, int width) const {
        const int row = t * kernel.tile_rows, rows = std::min(kernel.tile_rows, p.rows - row);
        float *y = p.y + row * p.y_stride + column;
        if (!p.epilogue) return kernel.store(s, y, p.y_stride, rows, width);
        alignas(64) float block[MAX_SUMS];  // avoids reading back from `y`
        kernel.store(s, block, kernel.panel_columns, rows, width);
        p.epilogue->block(block, kernel.panel_columns, rows, column, width);
        for (int i = 0; i < rows; i++) memcpy(y + i * p.y_stride, block + i * kernel.panel_columns, width * sizeof *y);
    }
};

}  // namespace

void OpenMp::run(void (*task)(void *, size_t), void *data) {
#pragma omp parallel for num_threads(size) schedule(static, 1)
    for (int i = 0; i < size; i++) task(data, i);
}

bool multiply(const Kernel &kernel, const Product &p, Team &team, Scratch &scratch) {
    const int tiles = ceil_div(p.rows, kernel.tile_rows), panels = ceil_div(p.columns, kernel.panel_columns);
    const size_t packed = size_t(ceil_div(p.inner, kernel.inner_block)) * tiles * kernel.tile_bytes;
    const size_t sums = size_t(std::min(panels, kernel.block_panels)) * kernel.panel_columns * tiles * kernel.tile_rows;
    const size_t per_thread = round_up_64(kernel.panel_bytes) + round_up_64(sums * sizeof(float));
    char *memory = scratch.reserve(packed + team.size * per_thread);
    if (!memory) return false;
    const Plan plan{kernel, p, tiles, memory};
    std::atomic<int> next_tile{0};
    GuidedRange chunks{panels, team.size, kernel.block_panels};
    team.each([&](int) {
        for (int t; (t = next_tile.fetch_add(1)) < plan.tiles;) plan.pack(t);
    });
    team.each([&](int member) {
        alignas(64) char saved[64];
        if (kernel.begin_thread) kernel.begin_thread(saved);
        char *panel = memory + packed + member * per_thread;
        for (int first, end; (first = chunks.next_chunk(end)) < panels;)
            plan.block(first, end, panel, reinterpret_cast<float *>(panel + round_up_64(kernel.panel_bytes)));
        if (kernel.end_thread) kernel.end_thread(saved);
    });
    return true;
}

int block_values(int type) {
    switch (type) {
        case F16: case Q4_0: case Q4_1: case Q8_0: return 32;  // 32 for F16, too: the step of all loops here
        case Q4_K: case Q5_K: case Q6_K: return 256;
    }
    return 0;
}

bool is_supported_type(int type) { return block_values(type) != 0; }

}  // namespace native
