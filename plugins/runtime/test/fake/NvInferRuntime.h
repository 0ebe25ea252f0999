// As much of TensorRT's interface as a session uses; machine.cpp is the TensorRT behind it.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#define NV_TENSORRT_MAJOR 10
#define NV_TENSORRT_MINOR 14
#define NV_TENSORRT_PATCH 1
#define NV_TENSORRT_VERSION 101401

namespace nvinfer1
{

enum class DataType
{
    kFLOAT,
    kHALF,
    kINT8,
    kINT32,
    kINT64,
    kBF16
};

enum class TensorIOMode
{
    kNONE,
    kINPUT,
    kOUTPUT
};

struct Dims
{
    int32_t nbDims;
    int64_t d[8];
};

class ILogger
{
public:
    enum class Severity
    {
        kINTERNAL_ERROR,
        kERROR,
        kWARNING
    };
    virtual void log(Severity severity, char const* message) noexcept = 0;
    virtual ~ILogger() = default;
};

class IPluginRegistry
{
public:
    virtual void* loadLibrary(char const* path) noexcept = 0;
    virtual void* getCreator(
        char const* name, char const* version, char const* nameSpace) noexcept = 0;
    virtual ~IPluginRegistry() = default;
};

class IExecutionContext
{
public:
    virtual bool setTensorAddress(char const* name, void* address) noexcept = 0;
    virtual bool setInputShape(char const* name, Dims const& dims) noexcept = 0;
    virtual bool enqueueV3(cudaStream_t stream) noexcept = 0;
    virtual ~IExecutionContext() = default;
};

class ICudaEngine
{
public:
    virtual TensorIOMode getTensorIOMode(char const* name) const noexcept = 0;
    virtual DataType getTensorDataType(char const* name) const noexcept = 0;
    virtual int32_t getNbIOTensors() const noexcept = 0;
    virtual IExecutionContext* createExecutionContext() noexcept = 0;
    virtual ~ICudaEngine() = default;
};

class IRuntime
{
public:
    virtual ICudaEngine* deserializeCudaEngine(void const* blob, size_t size) noexcept = 0;
    virtual void setEngineHostCodeAllowed(bool allowed) noexcept = 0;
    virtual IPluginRegistry& getPluginRegistry() noexcept = 0;
    virtual ~IRuntime() = default;
};

} // namespace nvinfer1
