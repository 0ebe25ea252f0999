// The ops as TensorRT plugins; their meaning is written in iq_export/sinks/ops.py.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

#include "iq/device_data.h"
#include "iq/kernels.h"
#include "iq/settings.h"

namespace iq
{

constexpr char const* kNamespace = "iq";
constexpr char const* kVersion = "1";

// What an input or output is, next to the first input x [..., hidden], float, half or bfloat16.
enum class Role
{
    kRows,   // type and shape of x
    kMask,   // bool [...]
    kIndex,  // int32 [...]
    kVector, // type of x, [hidden]
    kCodes,  // int8, shape of x
    kSide    // type of x, [..., number of side channels]
};

struct Port
{
    char const* name;
    Role role;
};

// What one launch works on.
struct Call
{
    Element element;
    int64_t rows;
    int64_t hidden;
    Settings const& settings;
    unsigned char const* device; // Settings::device there; null if it is empty
    void const* const* inputs;
    void* const* outputs;
    cudaStream_t stream;
};

// What distinguishes the ops. The first input is of kRows.
struct OpKind
{
    char const* name;
    std::vector<Port> inputs;
    std::vector<Port> outputs;
    std::vector<FieldSpec const*> fields;
    cudaError_t (*launch)(Call const& call);
};

// All ops of this library.
std::vector<OpKind const*> const& opKinds();

// Written against the API of TensorRT 10.3. Nothing in an Op changes after its construction: any
// number of threads may use it.
class Op final : public nvinfer1::IPluginV3,
                 public nvinfer1::IPluginV3OneCore,
                 public nvinfer1::IPluginV3OneBuild,
                 public nvinfer1::IPluginV3OneRuntime
{
public:
    // `device` is null until it is attached to a context.
    Op(OpKind const& kind, std::shared_ptr<Settings const> settings,
        std::shared_ptr<DeviceData const> device = nullptr);

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(
        nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    char const* getPluginName() const noexcept override;
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

    // IPluginV3OneBuild
    int32_t getNbOutputs() const noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
        nvinfer1::DataType const* inputTypes, int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
        nvinfer1::DimsExprs const* shapeInputs, int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs,
        int32_t nbOutputs, nvinfer1::IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut,
        int32_t nbInputs, int32_t nbOutputs) noexcept override;

    // IPluginV3OneRuntime
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::PluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc,
        nvinfer1::PluginTensorDesc const* outputDesc, void const* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(
        nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    // "op 'node'", for messages.
    std::string where() const;
    // Logs and returns the failure that TensorRT is given.
    int32_t fail(std::string const& message) const;
    // As it is said: what `action` throws is logged with the node.
    template <typename Action>
    int32_t attempt(Action action) const noexcept;
    // Counts and shapes of the inputs; `shape` gives one's by its number.
    template <typename ShapeOf>
    int32_t checkInputs(int32_t nbInputs, int32_t nbOutputs, ShapeOf shape) const noexcept;
    bool hasCounts(int32_t nbInputs, int32_t nbOutputs) const noexcept;
    // Throws std::invalid_argument if an input does not fit; sizes of -1 are not known yet.
    void checkShapes(std::vector<nvinfer1::Dims> const& inputs) const;
    void checkHidden(int64_t hidden) const;

    OpKind const& mKind;
    std::shared_ptr<Settings const> mSettings;
    std::shared_ptr<DeviceData const> mDevice;
};

// What getCreators gives. Calls within the library go here: other plugin libraries export a
// getCreators too, and the loader may bind to theirs.
nvinfer1::IPluginCreatorInterface* const* allCreators(int32_t& count) noexcept;

} // namespace iq
