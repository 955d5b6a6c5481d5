// Memory of llama.cpp's contexts that is taken when something is written to it, not before.
//
// A context has room for every position that it may hold, 128 KB each in eight blocks of a 7B, and llama.cpp clears all of it
// first: half of the time until such a model can be asked, and memory that a short conversation never uses. Pages that a
// process gives back are zero when it reads them again, and cost nothing until it writes. So that is how buffers on the CPU
// are cleared here. They lie where ggml has allocated them, which is private memory of this process.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#include "backend.h"
#include "ggml_interface.h"

namespace native {
namespace {

const uintptr_t PAGE = uintptr_t(sysconf(_SC_PAGESIZE));  // 4 KB on x86-64, up to 64 KB on aarch64
constexpr size_t LEAST = 1 << 16;

ggml_backend_buffer_t (*allocate)(ggml_backend_buffer_type_t, size_t) = nullptr;

void clear(ggml_backend_buffer_t buffer, uint8_t value) {
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

ggml_backend_buffer_t allocate_to_clear(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = allocate(type, size);
    if (buffer && buffer->size == size && size >= LEAST) buffer->iface.clear = clear;
    return buffer;
}

}  // namespace

void clear_by_giving_back() {
    ggml_backend_buffer_type &type = *ggml_backend_cpu_buffer_type();
    if (type.iface.alloc_buffer == allocate_to_clear) return;
    allocate = type.iface.alloc_buffer;
    type.iface.alloc_buffer = allocate_to_clear;
}

}  // namespace native
