// Two operators for ONNX Runtime, for processors on which the standard ones are slow:
//
// Linear     x: (batch, positions, inner) float32, W: (inner, columns) int8, scale and bias: (columns,) float32
//            -> (batch, positions, columns), with quick-GELU if `quick_gelu` is 1: see linear.cpp. Replaces the two integer
//            products and the dozen nodes around them that compute it with standard operators.
// Attention  qkv: (batch, positions, 3 * heads * width) float32 -> (batch, positions, heads * width): see vision_attention.cpp.

#include "operators.h"

#include <algorithm>
#include <new>

#include "formats.h"
#include "onnxruntime_interface.h"

namespace native {
namespace {

struct Operator {
    const OrtApi *api;
    int threads, heads, quick_gelu;
};

// ONNX Runtime's own threads, which would otherwise spin on processors that other threads need.
struct Threads final : Team {
    const OrtApi *const api;
    const void *const context;

    Threads(int count, const OrtApi *table, const void *kernel_context) : Team(count), api(table), context(kernel_context) {}
    void run(void (*task)(void *, size_t), void *data) override {
        call<PARALLEL_FOR>(api, context, task, size_t(size), size_t(size), data);
    }
};

// Rank of an input; writes its dimensions if there are at most three.
size_t sizes(const OrtApi *api, void *input, int64_t *out) {
    void *shape;
    size_t rank = 0;
    call<SHAPE>(api, const_cast<const void *>(input), &shape);
    call<RANK>(api, const_cast<const void *>(shape), &rank);
    if (rank <= 3) call<DIMENSIONS>(api, const_cast<const void *>(shape), out, rank);
    call<RELEASE_SHAPE>(api, shape);
    return rank;
}

// Input number i; writes the address of its data.
void *input(const OrtApi *api, void *context, size_t i, void **data) {
    void *found;
    call<INPUT>(api, const_cast<const void *>(context), i, &found);
    call<TENSOR_DATA>(api, found, data);
    return found;
}

// Allocate the result; returns a status, null on success.
void *output(const OrtApi *api, void *context, const int64_t (&shape)[3], float **data) {
    void *out;
    if (void *status = call<OUTPUT>(api, context, size_t(0), static_cast<const int64_t *>(shape), size_t(3), &out))
        return status;
    call<TENSOR_DATA>(api, out, data);
    return nullptr;
}

void *error_status(const OrtApi *api, const char *why) { return call<CREATE_STATUS>(api, FAIL, why); }

void *compute_linear(void *instance, void *context) {
    const Operator &self = *static_cast<const Operator *>(instance);
    void *data[4];
    int64_t shapes[4][3];
    float *y;
    for (size_t i = 0; i < 4; i++) {
        constexpr size_t RANKS[4] = {3, 2, 1, 1};
        if (sizes(self.api, input(self.api, context, i, &data[i]), shapes[i]) != RANKS[i])
            return error_status(self.api, "llava_edge.Linear: an input has the wrong rank.");
    }
    const int64_t batch = shapes[0][0], rows = shapes[0][1], inner = shapes[1][0], columns = shapes[1][1];
    if (inner <= 0 || inner % 16 || shapes[0][2] != inner || shapes[2][0] != columns || shapes[3][0] != columns)
        return error_status(self.api, "llava_edge.Linear: the shapes of its inputs do not match.");
    if (void *status = output(self.api, context, {batch, rows, columns}, &y)) return status;
    const Product p{INT8_TRANSPOSED, static_cast<const char *>(data[1]), size_t(columns),
                    static_cast<const float *>(data[0]), size_t(inner), y, size_t(columns),
                    int(batch * rows), int(columns), int(inner)};
    Threads team(self.threads, self.api, context);
    const Layer layer(static_cast<const float *>(data[2]), static_cast<const float *>(data[3]),
                      self.quick_gelu ? QUICK_GELU : NONE);
    if (!linear(p, layer, team))
        return error_status(self.api, "llava_edge.Linear: out of memory.");
    return nullptr;
}

void *compute_attention(void *instance, void *context) {
    const Operator &self = *static_cast<const Operator *>(instance);
    void *data;
    int64_t shape[3];
    float *y;
    if (sizes(self.api, input(self.api, context, 0, &data), shape) != 3)
        return error_status(self.api, "llava_edge.Attention: its input has the wrong rank.");
    const int64_t width = shape[2] / (3 * self.heads);
    if (shape[2] != 3 * self.heads * width || !supports_bidirectional(shape[1], width))
        return error_status(self.api, "llava_edge.Attention: its input does not match the number or width of heads.");
    if (void *status = output(self.api, context, {shape[0], shape[1], self.heads * width}, &y)) return status;
    Threads team(self.threads, self.api, context);
    const Bidirectional a{static_cast<const float *>(data), y, int(shape[0]), int(shape[1]), self.heads, int(width)};
    if (!attend_bidirectional(a, team)) return error_status(self.api, "llava_edge.Attention: out of memory.");
    return nullptr;
}

int attribute(const OrtApi *api, const void *info, const char *name, int minimum, int maximum) {
    int64_t value = minimum;
    if (void *status = call<ATTRIBUTE_INT>(api, info, name, &value)) call<RELEASE_STATUS>(api, status);
    return int(std::clamp<int64_t>(value, minimum, maximum));
}

void *create(const OrtCustomOp *, const OrtApi *api, const void *info) {
    return new Operator{api, attribute(api, info, "threads", 1, 512), attribute(api, info, "heads", 1, 1 << 14),
                        attribute(api, info, "quick_gelu", 0, 1)};
}

int zero(const OrtCustomOp *, size_t) { return 0; }
int none(const OrtCustomOp *) { return 0; }
int floats(const OrtCustomOp *, size_t) { return FLOAT; }

// Everything but names, inputs and computation is the same for both.
constexpr OrtCustomOp make_operator(const char *(*name)(const OrtCustomOp *), int (*input_type)(const OrtCustomOp *, size_t),
                         size_t (*inputs)(const OrtCustomOp *), void *(*compute)(void *, void *)) {
    return {
        ORT_INTERFACE, create, name,
        [](const OrtCustomOp *) -> const char * { return nullptr; },
        input_type, inputs, floats,
        [](const OrtCustomOp *) -> size_t { return 1; },
        nullptr,
        [](void *instance) { delete static_cast<Operator *>(instance); },
        zero, zero, zero,
        {none, none, none, none},
        nullptr,
        compute,
        {},
    };
}

constexpr OrtCustomOp LINEAR = make_operator(
    [](const OrtCustomOp *) { return "Linear"; }, [](const OrtCustomOp *, size_t i) { return i == 1 ? INT8 : FLOAT; },
    [](const OrtCustomOp *) -> size_t { return 4; }, compute_linear);
constexpr OrtCustomOp ATTENTION = make_operator(
    [](const OrtCustomOp *) { return "Attention"; }, floats, [](const OrtCustomOp *) -> size_t { return 1; },
    compute_attention);

}  // namespace
}  // namespace native

// Called by ONNX Runtime. The domain is never freed, because sessions use it until they end.
extern "C" EXPORT void *RegisterCustomOps(void *options, const native::OrtApiBase *base) {
    using namespace native;
    static const OrtApi *const api = base->get(ORT_INTERFACE);
    static void *domain = nullptr;
    if (!api) return nullptr;
    if (!domain) {
        if (void *status = call<CREATE_DOMAIN>(api, "llava_edge", &domain)) return status;
        for (const OrtCustomOp *one : {&LINEAR, &ATTENTION})
            if (void *status = call<ADD_OPERATOR>(api, domain, one)) return status;
    }
    return call<ADD_DOMAIN>(api, options, const_cast<const void *>(domain));
}
