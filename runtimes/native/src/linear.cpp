// An operator for ONNX Runtime: y = (x @ W) * scale + bias, with W in int8 as vision.onnx stores it.
//
// x: (batch, positions, inner) float32, W: (inner, columns) int8, scale and bias: (columns,) float32. In place of the two
// integer products and the dozen of steps around them that say the same in standard operators, for processors on which these
// are slow. The kernel is that of int16.cpp: activations keep 13 bits, which CLIP needs.

#include <algorithm>
#include <new>

#include "kernels.h"
#include "onnxruntime_interface.h"
#include "unpack.h"

namespace native {
namespace {

struct Operator {
    const OrtApi *api;
    int threads;
};

Scratch &scratch() {  // one for all layers of a session, which are computed one after another in one thread
    thread_local Scratch own;
    return own;
}

const Kernel *kernel() {
    for (const Kernel *const *k = kernels; *k; k++)
        if ((*k)->works() && (*k)->takes(BYTES_ACROSS)) return *k;
    return nullptr;
}

// ONNX Runtime's own threads, which would otherwise spin for work on the processors that others need.
struct Threads final : Team {
    const OrtApi *const api;
    const void *const context;

    Threads(int count, const OrtApi *table, const void *of) : Team(count), api(table), context(of) {}
    void run(void (*task)(void *, size_t), void *data) override {
        call<PARALLEL_FOR>(api, context, task, size_t(size), size_t(size), data);
    }
};

bool linear(const Product &p, const float *scale, const float *bias, Team &team) {
    const Kernel *const best = kernel();
    if (!best || !multiply(*best, p, team, scratch())) return false;
    team.each([&](int member) {
        for (int m = member * p.rows / team.size; m < (member + 1) * p.rows / team.size; m++) {
            float *y = p.y + m * p.y_stride;
            for (int n = 0; n < p.columns; n++) y[n] = y[n] * scale[n] + bias[n];
        }
    });
    return true;
}

// The rank of an input, and its sizes if there are no more than three.
size_t sizes(const OrtApi *api, void *input, int64_t *out) {
    void *shape;
    size_t rank = 0;
    call<SHAPE>(api, const_cast<const void *>(input), &shape);
    call<RANK>(api, const_cast<const void *>(shape), &rank);
    if (rank <= 3) call<DIMENSIONS>(api, const_cast<const void *>(shape), out, rank);
    call<RELEASE_SHAPE>(api, shape);
    return rank;
}

void *compute(void *made, void *context) {
    const Operator &own = *static_cast<const Operator *>(made);
    const auto failed = [&](const char *why) { return call<CREATE_STATUS>(own.api, FAIL, why); };
    void *data[4], *out, *y;
    int64_t shapes[4][3];
    for (size_t i = 0; i < 4; i++) {
        constexpr size_t RANKS[4] = {3, 2, 1, 1};
        void *input;
        call<INPUT>(own.api, const_cast<const void *>(context), i, &input);
        call<TENSOR_DATA>(own.api, input, &data[i]);
        if (sizes(own.api, input, shapes[i]) != RANKS[i]) return failed("llava_edge.Linear: an input has another rank.");
    }
    const int64_t batch = shapes[0][0], rows = shapes[0][1], inner = shapes[1][0], columns = shapes[1][1];
    if (shapes[0][2] != inner || shapes[2][0] != columns || shapes[3][0] != columns)
        return failed("llava_edge.Linear: its inputs do not fit each other.");
    const int64_t result[3] = {batch, rows, columns};
    if (void *status = call<OUTPUT>(own.api, context, size_t(0), static_cast<const int64_t *>(result), size_t(3), &out))
        return status;
    call<TENSOR_DATA>(own.api, out, &y);
    const Product p{BYTES_ACROSS, static_cast<const char *>(data[1]), size_t(columns),
                    static_cast<const float *>(data[0]), size_t(inner), static_cast<float *>(y), size_t(columns),
                    int(batch * rows), int(columns), int(inner)};
    Threads team(own.threads, own.api, context);
    if (!linear(p, static_cast<const float *>(data[2]), static_cast<const float *>(data[3]), team))
        return failed("llava_edge.Linear: out of memory.");
    return nullptr;
}

void *create(const OrtCustomOp *, const OrtApi *api, const void *info) {
    int64_t threads = 1;
    call<ATTRIBUTE_INT>(api, info, "threads", &threads);
    return new Operator{api, int(std::clamp<int64_t>(threads, 1, 512))};
}

int zero(const OrtCustomOp *, size_t) { return 0; }
int none(const OrtCustomOp *) { return 0; }

const OrtCustomOp LINEAR = {
    ORT_INTERFACE,
    create,
    [](const OrtCustomOp *) { return "Linear"; },
    [](const OrtCustomOp *) -> const char * { return nullptr; },
    [](const OrtCustomOp *, size_t i) { return i == 1 ? INT8 : FLOAT; },
    [](const OrtCustomOp *) -> size_t { return 4; },
    [](const OrtCustomOp *, size_t) { return FLOAT; },
    [](const OrtCustomOp *) -> size_t { return 1; },
    nullptr,
    [](void *made) { delete static_cast<Operator *>(made); },
    zero, zero, zero,
    {none, none, none, none},
    nullptr,
    compute,
    {},
};

}  // namespace
}  // namespace native

extern "C" {

#define EXPORT __attribute__((visibility("default")))

// What ONNX Runtime calls; the domain is never freed, since sessions use it to their end.
EXPORT void *RegisterCustomOps(void *options, const native::OrtApiBase *base) {
    using namespace native;
    static const OrtApi *const api = base->get(ORT_INTERFACE);
    static void *domain = nullptr;
    if (!api) return nullptr;
    if (!domain) {
        if (void *status = call<CREATE_DOMAIN>(api, "llava_edge", &domain)) return status;
        if (void *status = call<ADD_OPERATOR>(api, domain, &LINEAR)) return status;
    }
    return call<ADD_DOMAIN>(api, options, const_cast<const void *>(domain));
}

// The same alone, for tests and for the check.
EXPORT int llava_edge_native_linear(const float *x, const char *w, const float *scale, const float *bias, float *y, int rows,
                                    int columns, int inner, int threads) {
    using namespace native;
    const Product p{BYTES_ACROSS, w, size_t(columns), x, size_t(inner), y, size_t(columns), rows, columns, inner};
    OpenMp team(threads);
    return linear(p, scale, bias, team);
}
}
