// The one copy of an op's constants on the device.
#pragma once

#include <string>

#include <NvInferRuntime.h>

#include "iq/constants.h"

namespace iq
{

// Bytes on the current device. TensorRT's plugin registry keeps one copy for all contexts and nodes
// of equal content, and counts who holds it.
class DeviceData
{
public:
    // Uploads `bytes`, or joins the copy that is there. Throws std::runtime_error if it cannot.
    DeviceData(nvinfer1::IPluginRegistry& registry, Bytes const& bytes);
    ~DeviceData();
    DeviceData(DeviceData const&) = delete;
    DeviceData& operator=(DeviceData const&) = delete;

    unsigned char const* data() const noexcept
    {
        return mData;
    }

private:
    nvinfer1::IPluginRegistry& mRegistry;
    std::string mKey;
    unsigned char const* mData{nullptr};
};

// The registry of the TensorRT library that made `context`. This library is linked with none, so
// that one build serves all, hence it asks for the library behind the object. Throws
// std::runtime_error if there is none.
nvinfer1::IPluginRegistry& registryOf(nvinfer1::IPluginResourceContext* context);

} // namespace iq
