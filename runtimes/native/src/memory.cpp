// Clears llama.cpp's KV caches lazily, so that memory is only committed when it is written.
//
// A context allocates the KV cache of all its positions, 128 KB each in eight blocks of a 7B, and llama.cpp zeroes all of it
// first: half of the loading time of such a model, and memory that a short conversation never uses. After
// madvise(MADV_DONTNEED), pages read as zero and cost nothing until they are written, so CPU buffers are cleared that way.
// That is safe because ggml allocates them as private memory of this process.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#include "backend.h"
#include "ggml_interface.h"

namespace native {
namespace {

const uintptr_t PAGE = uintptr_t(sysconf(_SC_PAGESIZE));  // 4 KB on x86-64, up to 64 KB on aarch64
constexpr size_t MIN_SIZE = 1 << 16;

ggml_backend_buffer_t (*allocate)(ggml_backend_buffer_type_t, size_t) = nullptr;

void lazy_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    char *const base = static_cast<char *>(ggml_backend_buffer_get_base(buffer)), *const end = base + buffer->size;
    char *const first = base + (PAGE - reinterpret_cast<uintptr_t>(base) % PAGE) % PAGE;
    char *const last = end - reinterpret_cast<uintptr_t>(end) % PAGE;
    if (value || first >= last || madvise(first, last - first, MADV_DONTNEED)) {
        memset(base, value, buffer->size);
        return;
    }
    memset(base, 0, first - base);
    memset(last, 0, end - last);
}

ggml_backend_buffer_t allocate_with_lazy_clear(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = allocate(type, size);
    if (buffer && buffer->size == size && size >= MIN_SIZE) buffer->iface.clear = lazy_clear;
    return buffer;
}

}  // namespace

void install_lazy_clear() {
    ggml_backend_buffer_type &type = *ggml_backend_cpu_buffer_type();
    if (type.iface.alloc_buffer == allocate_with_lazy_clear) return;
    allocate = type.iface.alloc_buffer;
    type.iface.alloc_buffer = allocate_with_lazy_clear;
}

}  // namespace native
