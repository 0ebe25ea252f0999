// The ops of this library: their inputs, outputs, fields, and how their kernels are launched.
#include "iq/op.h"

namespace iq
{
namespace
{

template <typename T>
T const* input(Call const& call, size_t at)
{
    return static_cast<T const*>(call.inputs[at]);
}

Shape shapeOf(Call const& call)
{
    return {call.rows, call.hidden, call.settings.templateShape[0]};
}

float const* table(Call const& call)
{
    return reinterpret_cast<float const*>(call.device);
}

cudaError_t detect(Call const& call)
{
    return launchDetect(call.element, call.inputs[0], input<bool>(call, 1), input<bool>(call, 2),
        table(call), call.settings.threshold, shapeOf(call),
        static_cast<int32_t*>(call.outputs[0]), call.stream);
}

cudaError_t clampInsert(Call const& call)
{
    return launchClampInsert(call.element, call.inputs[0], input<int32_t>(call, 1), table(call),
        shapeOf(call), call.outputs[0], call.stream);
}

cudaError_t restore(Call const& call)
{
    return launchRestore(call.element, call.inputs[0], input<int32_t>(call, 1), table(call),
        shapeOf(call), call.outputs[0], call.stream);
}

// The templates' codes as rows of this type round them: see codeBytes.
int8_t const* insertedCodes(Call const& call)
{
    auto const tables = static_cast<int64_t>(call.element);
    auto const size = static_cast<int64_t>(call.settings.templates.size());
    return reinterpret_cast<int8_t const*>(call.device) + tables * size;
}

// x, branch, weight [, bias] [, index] -> sum, codes
template <bool kBias, bool kInsert>
cudaError_t addNorm(Call const& call)
{
    AddNorm op{};
    op.x = call.inputs[0];
    op.branch = call.inputs[1];
    op.weight = call.inputs[2];
    op.bias = kBias ? call.inputs[3] : nullptr;
    op.index = kInsert ? input<int32_t>(call, kBias ? 4 : 3) : nullptr;
    op.inserted = kInsert ? insertedCodes(call) : nullptr;
    op.epsilon = call.settings.epsilon;
    op.scale = call.settings.scale;
    op.shape = shapeOf(call);
    op.sum = call.outputs[0];
    op.codes = static_cast<int8_t*>(call.outputs[1]);
    return launchAddNorm(call.element, op, call.stream);
}

// gate, up [, index] -> codes [, side]
template <bool kClamp, bool kSides>
cudaError_t siluMul(Call const& call)
{
    SiluMul op{};
    op.gate = call.inputs[0];
    op.up = call.inputs[1];
    op.index = kClamp ? input<int32_t>(call, 2) : nullptr;
    op.slots = call.device;
    op.slotCount = static_cast<int64_t>(call.settings.device.size());
    op.sides = static_cast<int64_t>(call.settings.channels.size());
    op.rows = call.rows;
    op.features = call.hidden;
    op.block = call.settings.block;
    op.factor = call.settings.factor;
    op.scale = call.settings.scale;
    op.codes = static_cast<int8_t*>(call.outputs[0]);
    op.side = kSides ? call.outputs[1] : nullptr;
    return launchSiluMul(call.element, op, call.stream);
}

} // namespace

std::vector<OpKind const*> const& opKinds()
{
    static Port const x{"x", Role::kRows}, branch{"branch", Role::kRows};
    static Port const weight{"weight", Role::kVector}, bias{"bias", Role::kVector};
    static Port const gate{"gate", Role::kRows}, up{"up", Role::kRows};
    static Port const first{"first", Role::kMask}, valid{"valid", Role::kMask};
    static Port const index{"index", Role::kIndex}, y{"y", Role::kRows};
    static Port const sum{"sum", Role::kRows}, codes{"codes", Role::kCodes};
    static Port const side{"side", Role::kSide};

    using Fields = std::vector<FieldSpec const*>;
    static Fields const templates{&kTemplates, &kTemplateShape};
    static Fields const detection{&kTemplates, &kTemplateShape, &kThreshold};
    static Fields const norm{&kEpsilon, &kScale};
    static Fields const inserted{&kEpsilon, &kScale, &kTemplates, &kTemplateShape};
    static Fields const turned{&kBlock, &kFactor, &kScale};
    static Fields const sides{&kBlock, &kFactor, &kScale, &kChannels};

    static OpKind const kinds[] = {
        {"SinkDetect", {x, first, valid}, {index}, detection, detect},
        {"SinkClampInsert", {x, index}, {y}, templates, clampInsert},
        {"SinkRestore", {x, index}, {y}, templates, restore},
        {"AddRmsNormQuantize", {x, branch, weight}, {sum, codes}, norm, addNorm<false, false>},
        {"AddRmsNormInsertQuantize", {x, branch, weight, index}, {sum, codes}, inserted,
            addNorm<false, true>},
        {"AddLayerNormQuantize", {x, branch, weight, bias}, {sum, codes}, norm,
            addNorm<true, false>},
        {"AddLayerNormInsertQuantize", {x, branch, weight, bias, index}, {sum, codes}, inserted,
            addNorm<true, true>},
        {"SiluMulQuantize", {gate, up}, {codes}, turned, siluMul<false, false>},
        {"SiluMulClampQuantize", {gate, up, index}, {codes}, turned, siluMul<true, false>},
        {"SiluMulSideQuantize", {gate, up}, {codes, side}, sides, siluMul<false, true>},
        {"SiluMulClampSideQuantize", {gate, up, index}, {codes, side}, sides,
            siluMul<true, true>},
    };
    static std::vector<OpKind const*> const all = [] {
        std::vector<OpKind const*> found;
        for (OpKind const& kind : kinds)
        {
            found.push_back(&kind);
        }
        return found;
    }();
    return all;
}

} // namespace iq
