// The three sink ops as TensorRT plugins; their meaning is written in iq_export/sinks/ops.py.
#pragma once

#include <memory>
#include <vector>

#include <NvInferRuntime.h>

#include "iq/kernels.h"
#include "iq/template_table.h"

namespace iq
{

constexpr char const* kNamespace = "iq";
constexpr char const* kVersion = "1";

// What distinguishes the ops. Each works on x [..., hidden]; its other inputs, and an index, have
// the shape of x without the last axis.
struct OpKind
{
    char const* name;
    std::vector<nvinfer1::DataType> otherInputs; // after x
    bool givesIndex;                             // or else a changed x
    bool hasThreshold;
    cudaError_t (*launch)(Element element, Shape const& shape, TemplateTable const& table,
        float threshold, void const* const* inputs, void* output, cudaStream_t stream);
};

extern OpKind const kDetect;
extern OpKind const kClampInsert;
extern OpKind const kRestore;

// Written against the API of TensorRT 10.3.
class SinkOp final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime
{
public:
    SinkOp(OpKind const& kind, std::shared_ptr<TemplateTable> table, float threshold);

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
    int32_t fail(char const* message) const noexcept;
    bool hasInputs(int32_t nbInputs, int32_t nbOutputs) const noexcept;
    // 0 if x fits the table and another input fits x; sizes of -1 are not known yet.
    int32_t checkShapes(nvinfer1::Dims const& x, nvinfer1::Dims const& other) const noexcept;

    OpKind const& mKind;
    std::shared_ptr<TemplateTable> mTable; // shared with all clones
    float mThreshold;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

} // namespace iq
