// The part of ONNX Runtime's C interface that operators.cpp uses (onnxruntime_c_api.h). Its table only grows, so indices
// in it are stable; `OrtApiBase::get` returns null if this ONNX Runtime does not support that version.
#pragma once

#include <cstddef>
#include <cstdint>

namespace native {

constexpr uint32_t ORT_INTERFACE = 17;  // ONNX Runtime 1.17 and later

struct OrtApi {
    void *functions[275];
};

struct OrtApiBase {
    const OrtApi *(*get)(uint32_t version);
    const char *(*version)();
};

// Indices in the table.
constexpr int CREATE_STATUS = 0, CREATE_DOMAIN = 26, ADD_OPERATOR = 27, ADD_DOMAIN = 28;
constexpr int TENSOR_DATA = 51, RANK = 61, DIMENSIONS = 62, SHAPE = 65, ATTRIBUTE_INT = 86, INPUT = 90, OUTPUT = 91;
constexpr int RELEASE_STATUS = 93, RELEASE_SHAPE = 99, PARALLEL_FOR = 274;

constexpr int FLOAT = 1, INT8 = 3;  // ONNXTensorElementDataType
constexpr int FAIL = 1;             // OrtErrorCode

// Calls a function of the table, which returns a status (null on success) or nothing.
template <int PLACE, class... A>
void *call(const OrtApi *api, A... arguments) {
    return reinterpret_cast<void *(*)(A...)>(api->functions[PLACE])(arguments...);
}

struct OrtCustomOp {
    uint32_t version;
    void *(*create)(const OrtCustomOp *, const OrtApi *, const void *info);
    const char *(*name)(const OrtCustomOp *);
    const char *(*provider)(const OrtCustomOp *);  // null: the CPU
    int (*input_type)(const OrtCustomOp *, size_t);
    size_t (*inputs)(const OrtCustomOp *);
    int (*output_type)(const OrtCustomOp *, size_t);
    size_t (*outputs)(const OrtCustomOp *);
    void (*compute_silently)(void *kernel, void *context);
    void (*destroy)(void *kernel);
    int (*input_kind)(const OrtCustomOp *, size_t), (*output_kind)(const OrtCustomOp *, size_t);  // 0: required
    int (*input_memory)(const OrtCustomOp *, size_t);                                             // 0: the processor's
    int (*unused[4])(const OrtCustomOp *);  // of variadic ones
    void *(*create_or_fail)(const OrtCustomOp *, const OrtApi *, const void *info, void **kernel);
    void *(*compute)(void *kernel, void *context);  // in place of the silent one: returns a status
    void *others[14];                               // null: optional ones, or later than this version
};

}  // namespace native
