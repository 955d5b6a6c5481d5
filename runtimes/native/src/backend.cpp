// A ggml backend of the type "accelerator": llama.cpp offers it each operation first; the CPU backend computes the others.
//
// It accepts operations on host memory (memory-mapped weights are not copied) and computes them with OpenMP, whose threads it
// shares with ggml's CPU backend, so that no second team of threads spins meanwhile.

#include "backend.h"

#include <cstring>
#include <new>

#include "ggml-cpu.h"
#include "ggml_interface.h"

namespace native {
namespace {

constexpr const char *NAME = "LLAVA_EDGE";
constexpr int MAX_ROWS = 8192;  // bounds the scratch memory

Configuration config{};
int own_threads = 0;

struct Context {
    int threads = 1;
    ggml_abort_callback abort = nullptr;
    void *abort_data = nullptr;
    Scratch scratch;
};

Context *context(ggml_backend_t backend) { return static_cast<Context *>(backend->context); }

bool on_host(const ggml_tensor *t) {
    const ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    return !buffer || ggml_backend_buft_is_host(ggml_backend_buffer_get_type(buffer));
}

bool one_matrix(const ggml_tensor *t) { return t->ne[2] == 1 && t->ne[3] == 1; }
bool floats(const ggml_tensor *t) { return t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float); }
bool halves(const ggml_tensor *t) { return t->type == GGML_TYPE_F16 && t->nb[0] == 2; }
bool eight_bits(const ggml_tensor *t) { return t->type == GGML_TYPE_Q8_0 && t->nb[0] == 34 && t->ne[0] % 32 == 0; }
bool has(uint64_t types, int type) { return types >> type & 1; }

// The kernel for so many rows; null: multiply_few, or none
const Kernel *kernel(int type, int64_t rows) { return rows >= config.min_rows[type] ? config.kernel[type] : nullptr; }

bool supports_rows(const ggml_tensor *w, int64_t rows) {
    if (rows > MAX_ROWS || w->type >= TYPES || !is_supported_type(w->type)) return false;
    if (kernel(w->type, rows)) return w->ne[0] % block_values(w->type) == 0;
    return rows <= MAX_FEW && has(config.few, w->type) && supports_few(w->type, w->ne[1], w->ne[0]);
}

bool supports_product(const ggml_tensor *op) {
    const ggml_tensor *w = op->src[0], *x = op->src[1];
    return supports_rows(w, x->ne[1]) && on_host(w) && floats(x) && floats(op) && one_matrix(w) && one_matrix(x) &&
           w->ne[0] <= 1 << 20 && w->ne[1] <= 1 << 24 &&
           w->nb[0] == ggml_type_size(w->type) && w->nb[1] >= ggml_row_size(w->type, w->ne[0]) && x->nb[1] % 4 == 0;
}

bool supports_attention(const ggml_tensor *op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    float settings[3];  // scale, maximum ALiBi bias, logit soft cap
    memcpy(settings, op->op_params, sizeof settings);
    return (q->ne[1] <= MAX_FEW ? config.few_attention : config.attention) && mask && !op->src[4] && settings[1] == 0 &&
           settings[2] == 0 && floats(q) && floats(op) && halves(mask) &&
           ((halves(k) && halves(v)) || (eight_bits(k) && eight_bits(v))) &&
           q->ne[1] <= MAX_ROWS && q->ne[3] == 1 &&
           k->ne[3] == 1 && v->ne[3] == 1 && one_matrix(mask) && supports_width(q->ne[0]) && v->ne[0] == q->ne[0] &&
           k->ne[1] <= 1 << 17 && k->ne[1] == v->ne[1] && mask->ne[0] >= k->ne[1] && mask->ne[1] >= q->ne[1] &&
           q->ne[2] % k->ne[2] == 0 && k->ne[2] == v->ne[2] && on_host(q) && on_host(k) && on_host(v) && on_host(mask);
}

bool product(Context &c, const ggml_tensor *op) {
    const ggml_tensor *w = op->src[0], *x = op->src[1];
    const Product p{w->type, static_cast<const char *>(w->data), w->nb[1],
                    static_cast<const float *>(x->data), x->nb[1] / sizeof(float),
                    static_cast<float *>(op->data), op->nb[1] / sizeof(float),
                    int(x->ne[1]), int(w->ne[1]), int(w->ne[0])};
    const Kernel *of_many = kernel(w->type, p.rows);
    if (!of_many) return multiply_few(p, c.threads, c.scratch);
    OpenMp team(c.threads);
    return multiply(*of_many, p, team, c.scratch);
}

bool attention(Context &c, const ggml_tensor *op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    Attention a{};
    a.q = static_cast<const char *>(q->data), a.q_row = q->nb[1], a.q_head = q->nb[2];
    a.k = static_cast<const char *>(k->data), a.k_row = k->nb[1], a.k_head = k->nb[2];
    a.v = static_cast<const char *>(v->data), a.v_row = v->nb[1], a.v_head = v->nb[2];
    a.mask = static_cast<const char *>(mask->data), a.mask_row = mask->nb[1];
    a.out = static_cast<char *>(op->data), a.out_row = op->nb[2], a.out_head = op->nb[1];
    a.queries = q->ne[1], a.keys = k->ne[1], a.heads = q->ne[2], a.kv_heads = k->ne[2], a.width = q->ne[0];
    memcpy(&a.scale, op->op_params, sizeof a.scale);
    a.eight_bits = eight_bits(k);
    return a.queries <= MAX_FEW ? attend_few(a, c.threads, c.scratch) : attend(a, c.threads, c.scratch);
}

// ---- backend

const char *backend_name(ggml_backend_t) { return NAME; }

void backend_free(ggml_backend_t backend) {
    delete context(backend);
    delete backend;
}

ggml_status compute(ggml_backend_t backend, ggml_cgraph *graph) {
    Context &c = *context(backend);
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        const ggml_tensor *op = ggml_graph_node(graph, i);
        if (c.abort && c.abort(c.abort_data)) return GGML_STATUS_ABORTED;
        if (!(op->flags & GGML_TENSOR_FLAG_COMPUTE)) continue;
        if (op->op == GGML_OP_MUL_MAT && !product(c, op)) return GGML_STATUS_ALLOC_FAILED;
        if (op->op == GGML_OP_FLASH_ATTN_EXT && !attention(c, op)) return GGML_STATUS_ALLOC_FAILED;
    }
    return GGML_STATUS_SUCCESS;
}

void set_threads(ggml_backend_t backend, int threads) { context(backend)->threads = own_threads ? own_threads : threads; }

void set_abort(ggml_backend_t backend, ggml_abort_callback abort, void *data) {
    context(backend)->abort = abort;
    context(backend)->abort_data = data;
}

// ---- device

const char *device_name(ggml_backend_dev_t) { return NAME; }
const char *device_description(ggml_backend_dev_t) { return "kernels of llava-edge"; }
void device_memory(ggml_backend_dev_t, size_t *free, size_t *total) { *free = *total = 0; }
enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; }
ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t) { return ggml_backend_cpu_buffer_type(); }
bool device_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t type) { return ggml_backend_buft_is_host(type); }

void device_properties(ggml_backend_dev_t device, ggml_backend_dev_props *properties) {
    *properties = {};
    properties->name = NAME;
    properties->description = device_description(device);
    properties->type = GGML_BACKEND_DEVICE_TYPE_ACCEL;
    properties->caps.buffer_from_host_ptr = true;
}

ggml_backend_buffer_t device_buffer_from_ptr(ggml_backend_dev_t, void *memory, size_t size, size_t) {
    return ggml_backend_cpu_buffer_from_ptr(memory, size);
}

bool device_supports_op(ggml_backend_dev_t, const ggml_tensor *op) {
    switch (op->op) {
        case GGML_OP_NONE: case GGML_OP_RESHAPE: case GGML_OP_VIEW: case GGML_OP_PERMUTE: case GGML_OP_TRANSPOSE:
            return true;  // nothing to compute
        case GGML_OP_MUL_MAT: return supports_product(op);
        case GGML_OP_FLASH_ATTN_EXT: return supports_attention(op);
        default: return false;
    }
}

ggml_backend_t device_open(ggml_backend_dev_t device, const char *) {
    static ggml_guid guid = {0x6c, 0x6c, 0x61, 0x76, 0x61, 0x2d, 0x65, 0x64, 0x67, 0x65, 0, 0, 0, 0, 0, 1};
    Context *own = new (std::nothrow) Context;
    ggml_backend *backend = new (std::nothrow) ggml_backend{};
    if (!own || !backend) {
        delete own;
        delete backend;
        return nullptr;
    }
    backend->guid = &guid;
    backend->iface.get_name = backend_name;
    backend->iface.free = backend_free;
    backend->iface.graph_compute = compute;
    backend->device = device;
    backend->context = own;
    return backend;
}

// ---- registry

const char *registry_name(ggml_backend_reg_t) { return NAME; }
size_t registry_count(ggml_backend_reg_t) { return 1; }

ggml_backend_dev_t registry_device(ggml_backend_reg_t registry, size_t) {
    static ggml_backend_device device{};
    device.iface.get_name = device_name;
    device.iface.get_description = device_description;
    device.iface.get_memory = device_memory;
    device.iface.get_type = device_type;
    device.iface.get_props = device_properties;
    device.iface.init_backend = device_open;
    device.iface.get_buffer_type = device_buffer_type;
    device.iface.buffer_from_host_ptr = device_buffer_from_ptr;
    device.iface.supports_op = device_supports_op;
    device.iface.supports_buft = device_supports_buft;
    device.reg = registry;
    return &device;
}

void *registry_function(ggml_backend_reg_t, const char *name) {
    if (!strcmp(name, "ggml_backend_set_n_threads")) return reinterpret_cast<void *>(set_threads);
    if (!strcmp(name, "ggml_backend_set_abort_callback")) return reinterpret_cast<void *>(set_abort);
    return nullptr;
}

}  // namespace

void configure(const Configuration &new_config) { config = new_config; }
void set_own_threads(int threads) { own_threads = threads; }

}  // namespace native

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init() {
    native::install_lazy_clear();
    static ggml_backend_reg registry{};
    registry.api_version = GGML_BACKEND_API_VERSION;
    registry.iface.get_name = native::registry_name;
    registry.iface.get_device_count = native::registry_count;
    registry.iface.get_device = native::registry_device;
    registry.iface.get_proc_address = native::registry_function;
    return &registry;
}
