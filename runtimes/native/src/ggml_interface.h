// The parts of ggml's backend interface that no installed header declares.
//
// Taken from ggml/src/ggml-backend-impl.h of llama.cpp (MIT licence, Copyright (c) 2023-2026 The ggml authors), interface
// version 2, without the functions that this library leaves null. It must match the ggml that loads the library: only exact
// versions are accepted (runtimes/native/__init__.py), and ggml_backend_load refuses another interface version.
#pragma once

#include "ggml-backend.h"

extern "C" {

constexpr int GGML_BACKEND_API_VERSION = 2;
typedef void (*ggml_unused)(void);

struct ggml_backend_i {
    const char *(*get_name)(ggml_backend_t);
    void (*free)(ggml_backend_t);
    ggml_unused set_tensor_async, get_tensor_async, set_tensor_2d_async, get_tensor_2d_async, cpy_tensor_async, synchronize;
    ggml_unused graph_plan_create, graph_plan_free, graph_plan_update, graph_plan_compute;
    enum ggml_status (*graph_compute)(ggml_backend_t, struct ggml_cgraph *);
    ggml_unused event_record, event_wait, graph_optimize;
};

struct ggml_backend {
    ggml_guid_t guid;
    struct ggml_backend_i iface;
    ggml_backend_dev_t device;
    void *context;
};

struct ggml_backend_buffer_i {
    ggml_unused free_buffer, get_base, init_tensor, memset_tensor, set_tensor, get_tensor, set_tensor_2d, get_tensor_2d;
    ggml_unused cpy_tensor;
    void (*clear)(ggml_backend_buffer_t, uint8_t value);
    ggml_unused reset;
};

struct ggml_backend_buffer {
    struct ggml_backend_buffer_i iface;
    ggml_backend_buffer_type_t type;
    void *context;
    size_t size;
    enum ggml_backend_buffer_usage usage;
};

struct ggml_backend_buffer_type_i {
    const char *(*get_name)(ggml_backend_buffer_type_t);
    ggml_backend_buffer_t (*alloc_buffer)(ggml_backend_buffer_type_t, size_t size);
    ggml_unused get_alignment, get_max_size, get_alloc_size, is_host;
};

struct ggml_backend_buffer_type {
    struct ggml_backend_buffer_type_i iface;
    ggml_backend_dev_t device;
    void *context;
};

struct ggml_backend_device_i {
    const char *(*get_name)(ggml_backend_dev_t);
    const char *(*get_description)(ggml_backend_dev_t);
    void (*get_memory)(ggml_backend_dev_t, size_t *free, size_t *total);
    enum ggml_backend_dev_type (*get_type)(ggml_backend_dev_t);
    void (*get_props)(ggml_backend_dev_t, struct ggml_backend_dev_props *);
    ggml_backend_t (*init_backend)(ggml_backend_dev_t, const char *params);
    ggml_backend_buffer_type_t (*get_buffer_type)(ggml_backend_dev_t);
    ggml_backend_buffer_type_t (*get_host_buffer_type)(ggml_backend_dev_t);
    ggml_backend_buffer_t (*buffer_from_host_ptr)(ggml_backend_dev_t, void *, size_t size, size_t max_tensor_size);
    bool (*supports_op)(ggml_backend_dev_t, const struct ggml_tensor *op);
    bool (*supports_buft)(ggml_backend_dev_t, ggml_backend_buffer_type_t);
    ggml_unused offload_op, event_new, event_free, event_synchronize;
};

struct ggml_backend_device {
    struct ggml_backend_device_i iface;
    ggml_backend_reg_t reg;
    void *context;
};

struct ggml_backend_reg_i {
    const char *(*get_name)(ggml_backend_reg_t);
    size_t (*get_device_count)(ggml_backend_reg_t);
    ggml_backend_dev_t (*get_device)(ggml_backend_reg_t, size_t index);
    void *(*get_proc_address)(ggml_backend_reg_t, const char *name);
};

struct ggml_backend_reg {
    int api_version;
    struct ggml_backend_reg_i iface;
    void *context;
};

}
