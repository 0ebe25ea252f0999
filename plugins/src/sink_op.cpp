#include "iq/sink_op.h"

#include <string>

#include "iq/log.h"

namespace iq
{

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

namespace
{

constexpr int32_t kSuccess = 0;
constexpr int32_t kFailure = -1;

bool isActivation(DataType type) noexcept
{
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

Element elementOf(DataType type) noexcept
{
    switch (type)
    {
    case DataType::kHALF: return Element::kHalf;
    case DataType::kBF16: return Element::kBFloat16;
    default: return Element::kFloat;
    }
}

cudaError_t detect(Element element, Shape const& shape, TemplateTable const& table, float threshold,
    void const* const* inputs, void* output, cudaStream_t stream)
{
    return launchDetect(element, inputs[0], static_cast<bool const*>(inputs[1]),
        static_cast<bool const*>(inputs[2]), table.deviceValues(), table.deviceEnergies(),
        threshold, shape, static_cast<int32_t*>(output), stream);
}

cudaError_t clampInsert(Element element, Shape const& shape, TemplateTable const& table,
    float /*threshold*/, void const* const* inputs, void* output, cudaStream_t stream)
{
    return launchClampInsert(element, inputs[0], static_cast<int32_t const*>(inputs[1]),
        table.deviceValues(), shape, output, stream);
}

cudaError_t restore(Element element, Shape const& shape, TemplateTable const& table,
    float /*threshold*/, void const* const* inputs, void* output, cudaStream_t stream)
{
    return launchRestore(element, inputs[0], static_cast<int32_t const*>(inputs[1]),
        table.deviceValues(), shape, output, stream);
}

} // namespace

OpKind const kDetect{"SinkDetect", {DataType::kBOOL, DataType::kBOOL}, true, true, detect};
OpKind const kClampInsert{"SinkClampInsert", {DataType::kINT32}, false, false, clampInsert};
OpKind const kRestore{"SinkRestore", {DataType::kINT32}, false, false, restore};

SinkOp::SinkOp(OpKind const& kind, std::shared_ptr<TemplateTable> table, float threshold)
    : mKind(kind)
    , mTable(std::move(table))
    , mThreshold(threshold)
{
}

nvinfer1::IPluginCapability* SinkOp::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* SinkOp::clone() noexcept
{
    return guarded<nvinfer1::IPluginV3*>(
        mKind.name, nullptr, [this] { return new SinkOp(mKind, mTable, mThreshold); });
}

char const* SinkOp::getPluginName() const noexcept
{
    return mKind.name;
}

char const* SinkOp::getPluginVersion() const noexcept
{
    return kVersion;
}

char const* SinkOp::getPluginNamespace() const noexcept
{
    return kNamespace;
}

int32_t SinkOp::getNbOutputs() const noexcept
{
    return 1;
}

int32_t SinkOp::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs,
    DynamicPluginTensorDesc const* /*out*/, int32_t nbOutputs) noexcept
{
    if (!hasInputs(nbInputs, nbOutputs))
    {
        return kFailure;
    }
    for (int32_t i = 1; i < nbInputs; ++i)
    {
        if (checkShapes(in[0].desc.dims, in[i].desc.dims) != kSuccess)
        {
            return kFailure;
        }
    }
    return kSuccess;
}

int32_t SinkOp::getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs,
    DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    if (!hasInputs(nbInputs, nbOutputs))
    {
        return kFailure;
    }
    outputTypes[0] = mKind.givesIndex ? DataType::kINT32 : inputTypes[0];
    return kSuccess;
}

int32_t SinkOp::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
    nvinfer1::DimsExprs const* /*shapeInputs*/, int32_t /*nbShapeInputs*/,
    nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
    nvinfer1::IExprBuilder& /*exprBuilder*/) noexcept
{
    if (!hasInputs(nbInputs, nbOutputs))
    {
        return kFailure;
    }
    outputs[0] = inputs[0];
    if (mKind.givesIndex)
    {
        if (inputs[0].nbDims < 1)
        {
            return fail("x must have at least one axis");
        }
        --outputs[0].nbDims;
    }
    return kSuccess;
}

bool SinkOp::supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* inOut,
    int32_t nbInputs, int32_t nbOutputs) noexcept
{
    if (!hasInputs(nbInputs, nbOutputs) || pos < 0 || pos >= nbInputs + nbOutputs)
    {
        return false;
    }
    PluginTensorDesc const& desc = inOut[pos].desc;
    if (desc.format != nvinfer1::TensorFormat::kLINEAR)
    {
        return false;
    }
    if (pos == 0)
    {
        return isActivation(desc.type);
    }
    if (pos < nbInputs)
    {
        return desc.type == mKind.otherInputs[static_cast<size_t>(pos) - 1];
    }
    return desc.type == (mKind.givesIndex ? DataType::kINT32 : inOut[0].desc.type);
}

int32_t SinkOp::onShapeChange(PluginTensorDesc const* in, int32_t nbInputs,
    PluginTensorDesc const* /*out*/, int32_t nbOutputs) noexcept
{
    if (!hasInputs(nbInputs, nbOutputs))
    {
        return kFailure;
    }
    for (int32_t i = 1; i < nbInputs; ++i)
    {
        if (checkShapes(in[0].dims, in[i].dims) != kSuccess)
        {
            return kFailure;
        }
    }
    return kSuccess;
}

int32_t SinkOp::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* /*outputDesc*/,
    void const* const* inputs, void* const* outputs, void* /*workspace*/,
    cudaStream_t stream) noexcept
{
    Dims const& x = inputDesc[0].dims;
    Shape shape{1, mTable->hidden(), mTable->templates()};
    for (int32_t axis = 0; axis < x.nbDims - 1; ++axis)
    {
        shape.rows *= x.d[axis];
    }
    if (mTable->deviceValues() == nullptr)
    {
        return fail("enqueued before it was attached to a context");
    }
    cudaError_t const status = mKind.launch(
        elementOf(inputDesc[0].type), shape, *mTable, mThreshold, inputs, outputs[0], stream);
    return status == cudaSuccess ? kSuccess : fail(cudaGetErrorString(status));
}

nvinfer1::IPluginV3* SinkOp::attachToContext(
    nvinfer1::IPluginResourceContext* /*context*/) noexcept
{
    return guarded<nvinfer1::IPluginV3*>(mKind.name, nullptr, [this] {
        mTable->upload();
        return new SinkOp(mKind, mTable, mThreshold);
    });
}

nvinfer1::PluginFieldCollection const* SinkOp::getFieldsToSerialize() noexcept
{
    return guarded<nvinfer1::PluginFieldCollection const*>(mKind.name, nullptr, [this] {
        auto const& values = mTable->values();
        mFields = {
            PluginField("templates", values.data(), PluginFieldType::kFLOAT32,
                static_cast<int32_t>(values.size())),
            PluginField("template_shape", mTable->shape(), PluginFieldType::kINT32, 2),
        };
        if (mKind.hasThreshold)
        {
            mFields.emplace_back("threshold", &mThreshold, PluginFieldType::kFLOAT32, 1);
        }
        mCollection.nbFields = static_cast<int32_t>(mFields.size());
        mCollection.fields = mFields.data();
        return &mCollection;
    });
}

int32_t SinkOp::fail(char const* message) const noexcept
{
    return guarded(mKind.name, kFailure, [this, message] {
        logError(std::string(mKind.name) + ": " + message);
        return kFailure;
    });
}

bool SinkOp::hasInputs(int32_t nbInputs, int32_t nbOutputs) const noexcept
{
    int32_t const expected = static_cast<int32_t>(mKind.otherInputs.size()) + 1;
    if (nbInputs == expected && nbOutputs == getNbOutputs())
    {
        return true;
    }
    fail("wrong number of inputs or outputs");
    return false;
}

int32_t SinkOp::checkShapes(Dims const& x, Dims const& other) const noexcept
{
    if (x.nbDims != other.nbDims + 1)
    {
        return fail("x must have one axis more than the other inputs");
    }
    int64_t const hidden = x.d[x.nbDims - 1];
    if (hidden >= 0 && hidden != mTable->hidden())
    {
        return fail("the last axis of x is not as long as a template");
    }
    for (int32_t axis = 0; axis < other.nbDims; ++axis)
    {
        if (x.d[axis] >= 0 && other.d[axis] >= 0 && x.d[axis] != other.d[axis])
        {
            return fail("the other inputs do not have the shape of x without its last axis");
        }
    }
    return kSuccess;
}

} // namespace iq
