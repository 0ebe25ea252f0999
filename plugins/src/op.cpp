#include "iq/op.h"

#include <stdexcept>

#include "iq/log.h"

namespace iq
{

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
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

DataType typeOf(Role role, DataType x) noexcept
{
    switch (role)
    {
    case Role::kMask: return DataType::kBOOL;
    case Role::kIndex: return DataType::kINT32;
    case Role::kCodes: return DataType::kINT8;
    default: return x;
    }
}

char const* nameOf(DataType type) noexcept
{
    switch (type)
    {
    case DataType::kFLOAT: return "float";
    case DataType::kHALF: return "half";
    case DataType::kBF16: return "bfloat16";
    case DataType::kINT8: return "int8";
    case DataType::kINT32: return "int32";
    case DataType::kINT64: return "int64";
    case DataType::kBOOL: return "bool";
    default: return "another type";
    }
}

std::string textOf(Dims const& dims)
{
    std::string text = "[";
    for (int32_t axis = 0; axis < dims.nbDims; ++axis)
    {
        text += (axis == 0 ? "" : ", ") + std::to_string(dims.d[axis]);
    }
    return text + "]";
}

// The shape that an input of `role` has next to x.
Dims shapeOf(Role role, Dims const& x)
{
    Dims wanted = x;
    if (role == Role::kVector)
    {
        wanted.nbDims = 1;
        wanted.d[0] = x.d[x.nbDims - 1];
    }
    else if (role != Role::kRows)
    {
        --wanted.nbDims;
    }
    return wanted;
}

bool fits(Dims const& wanted, Dims const& found) noexcept
{
    if (wanted.nbDims != found.nbDims)
    {
        return false;
    }
    for (int32_t axis = 0; axis < wanted.nbDims; ++axis)
    {
        if (wanted.d[axis] >= 0 && found.d[axis] >= 0 && wanted.d[axis] != found.d[axis])
        {
            return false;
        }
    }
    return true;
}

} // namespace

Op::Op(OpKind const& kind, std::shared_ptr<Settings const> settings,
    std::shared_ptr<DeviceData const> device)
    : mKind(kind)
    , mSettings(std::move(settings))
    , mDevice(std::move(device))
{
}

nvinfer1::IPluginCapability* Op::getCapabilityInterface(
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

nvinfer1::IPluginV3* Op::clone() noexcept
{
    return guarded<nvinfer1::IPluginV3*>(
        mKind.name, nullptr, [this] { return new Op(mKind, mSettings, mDevice); });
}

char const* Op::getPluginName() const noexcept
{
    return mKind.name;
}

char const* Op::getPluginVersion() const noexcept
{
    return kVersion;
}

char const* Op::getPluginNamespace() const noexcept
{
    return kNamespace;
}

int32_t Op::getNbOutputs() const noexcept
{
    return static_cast<int32_t>(mKind.outputs.size());
}

int32_t Op::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs,
    DynamicPluginTensorDesc const* /*out*/, int32_t nbOutputs) noexcept
{
    return checkInputs(nbInputs, nbOutputs, [in](int32_t i) { return in[i].desc.dims; });
}

int32_t Op::getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs,
    DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    return attempt([&] {
        if (!hasCounts(nbInputs, nbOutputs))
        {
            return kFailure;
        }
        if (!isActivation(inputTypes[0]))
        {
            return fail(std::string("input '") + mKind.inputs[0].name + "' is of type "
                + nameOf(inputTypes[0]) + ", not float, half or bfloat16");
        }
        for (size_t i = 0; i < mKind.inputs.size(); ++i)
        {
            DataType const wanted = typeOf(mKind.inputs[i].role, inputTypes[0]);
            if (inputTypes[i] != wanted)
            {
                return fail(std::string("input '") + mKind.inputs[i].name + "' is of type "
                    + nameOf(inputTypes[i]) + ", not " + nameOf(wanted));
            }
        }
        for (size_t i = 0; i < mKind.outputs.size(); ++i)
        {
            outputTypes[i] = typeOf(mKind.outputs[i].role, inputTypes[0]);
        }
        return kSuccess;
    });
}

int32_t Op::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
    nvinfer1::DimsExprs const* /*shapeInputs*/, int32_t /*nbShapeInputs*/,
    nvinfer1::DimsExprs* outputs, int32_t nbOutputs, nvinfer1::IExprBuilder& exprBuilder) noexcept
{
    return attempt([&] {
        if (!hasCounts(nbInputs, nbOutputs))
        {
            return kFailure;
        }
        if (inputs[0].nbDims < 1)
        {
            return fail(std::string("input '") + mKind.inputs[0].name + "' has no axis");
        }
        for (size_t i = 0; i < mKind.outputs.size(); ++i)
        {
            outputs[i] = inputs[0];
            if (mKind.outputs[i].role == Role::kIndex)
            {
                --outputs[i].nbDims;
            }
            if (mKind.outputs[i].role == Role::kSide)
            {
                outputs[i].d[outputs[i].nbDims - 1]
                    = exprBuilder.constant(static_cast<int32_t>(mSettings->channels.size()));
            }
        }
        return kSuccess;
    });
}

// TensorRT asks for combinations that it could use: a refusal here is an answer, not a failure.
bool Op::supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* inOut,
    int32_t nbInputs, int32_t nbOutputs) noexcept
{
    if (!hasCounts(nbInputs, nbOutputs) || pos < 0 || pos >= nbInputs + nbOutputs)
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
    auto const at = static_cast<size_t>(pos < nbInputs ? pos : pos - nbInputs);
    Role const role = pos < nbInputs ? mKind.inputs[at].role : mKind.outputs[at].role;
    return desc.type == typeOf(role, inOut[0].desc.type);
}

int32_t Op::onShapeChange(PluginTensorDesc const* in, int32_t nbInputs,
    PluginTensorDesc const* /*out*/, int32_t nbOutputs) noexcept
{
    int32_t const status
        = checkInputs(nbInputs, nbOutputs, [in](int32_t i) { return in[i].dims; });
    if (status != kSuccess || mDevice != nullptr || mSettings->device.empty())
    {
        return status;
    }
    // A builder that times a plugin need not have attached it to a context. Not in enqueue: that
    // may be captured, and nothing is allocated in a capture.
    return attempt([&] {
        mDevice = DeviceData::of(mSettings->device);
        return kSuccess;
    });
}

int32_t Op::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* /*outputDesc*/,
    void const* const* inputs, void* const* outputs, void* /*workspace*/,
    cudaStream_t stream) noexcept
{
    return attempt([&] {
        if (mDevice == nullptr && !mSettings->device.empty())
        {
            return fail("enqueued before it was attached to a context");
        }
        Dims const& x = inputDesc[0].dims;
        int64_t rows = 1;
        for (int32_t axis = 0; axis < x.nbDims - 1; ++axis)
        {
            rows *= x.d[axis];
        }
        cudaError_t const status = mKind.launch({elementOf(inputDesc[0].type), rows,
            x.d[x.nbDims - 1], *mSettings, mDevice == nullptr ? nullptr : mDevice->data(), inputs,
            outputs, stream});
        return status == cudaSuccess ? kSuccess : fail(cudaGetErrorString(status));
    });
}

nvinfer1::IPluginV3* Op::attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept
{
    nvinfer1::IPluginV3* attached = nullptr;
    static_cast<void>(attempt([&] {
        std::shared_ptr<DeviceData const> device;
        if (!mSettings->device.empty())
        {
            device = DeviceData::of(mSettings->device);
        }
        attached = new Op(mKind, mSettings, std::move(device));
        return kSuccess;
    }));
    return attached;
}

nvinfer1::PluginFieldCollection const* Op::getFieldsToSerialize() noexcept
{
    return &mSettings->collection;
}

std::string Op::where() const
{
    return std::string(mKind.name) + " '" + mSettings->node + "'";
}

int32_t Op::fail(std::string const& message) const
{
    logError(where() + ": " + message);
    return kFailure;
}

template <typename Action>
int32_t Op::attempt(Action action) const noexcept
{
    return guarded(mKind.name, kFailure, [&] {
        try
        {
            return action();
        }
        catch (std::exception const& error)
        {
            return fail(error.what());
        }
    });
}

template <typename ShapeOf>
int32_t Op::checkInputs(int32_t nbInputs, int32_t nbOutputs, ShapeOf shape) const noexcept
{
    return attempt([&] {
        if (!hasCounts(nbInputs, nbOutputs))
        {
            return kFailure;
        }
        std::vector<Dims> shapes;
        for (int32_t i = 0; i < nbInputs; ++i)
        {
            shapes.push_back(shape(i));
        }
        checkShapes(shapes);
        return kSuccess;
    });
}

bool Op::hasCounts(int32_t nbInputs, int32_t nbOutputs) const noexcept
{
    if (nbInputs == static_cast<int32_t>(mKind.inputs.size()) && nbOutputs == getNbOutputs())
    {
        return true;
    }
    static_cast<void>(attempt([&] {
        return fail("has " + std::to_string(nbInputs) + " inputs and " + std::to_string(nbOutputs)
            + " outputs, not " + std::to_string(mKind.inputs.size()) + " and "
            + std::to_string(mKind.outputs.size()));
    }));
    return false;
}

void Op::checkShapes(std::vector<Dims> const& inputs) const
{
    Dims const& x = inputs[0];
    if (x.nbDims < 1)
    {
        throw std::invalid_argument(
            std::string("input '") + mKind.inputs[0].name + "' has no axis");
    }
    for (size_t i = 1; i < inputs.size(); ++i)
    {
        Dims const wanted = shapeOf(mKind.inputs[i].role, x);
        if (!fits(wanted, inputs[i]))
        {
            throw std::invalid_argument(std::string("input '") + mKind.inputs[i].name
                + "' has the shape " + textOf(inputs[i]) + ", not " + textOf(wanted));
        }
    }
    if (x.d[x.nbDims - 1] >= 0)
    {
        checkHidden(x.d[x.nbDims - 1]);
    }
}

void Op::checkHidden(int64_t hidden) const
{
    std::string const axis = std::string("the last axis of '") + mKind.inputs[0].name + "' has "
        + std::to_string(hidden) + " elements";
    if (hidden > kLongestRow)
    {
        throw std::invalid_argument(axis + ", at most " + std::to_string(kLongestRow));
    }
    if (!mSettings->templates.empty() && hidden != mSettings->templateShape[1])
    {
        throw std::invalid_argument(
            axis + ", a template " + std::to_string(mSettings->templateShape[1]));
    }
    if (hidden % mSettings->block != 0)
    {
        throw std::invalid_argument(
            axis + ", no multiple of block " + std::to_string(mSettings->block));
    }
    for (int32_t const channel : mSettings->channels)
    {
        if (channel >= hidden)
        {
            throw std::invalid_argument(axis + ", no side channel " + std::to_string(channel));
        }
    }
}

} // namespace iq
