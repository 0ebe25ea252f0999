// The one copy of an op's constants on the device.
#pragma once

#include <memory>

#include "iq/constants.h"

namespace iq
{

// Bytes on a device. All nodes, contexts and engines of a process share one copy of equal content.
//
// TensorRT's plugin registry could hold it (IPluginResource). But the registry of TensorRT for RTX
// has its functions in another order than the enterprise headers declare (seen with 1.7: the call
// crashes), and this library serves both.
class DeviceData
{
public:
    // The copy on the current device, uploaded if nobody holds one. Throws std::runtime_error if
    // it cannot be.
    static std::shared_ptr<DeviceData const> of(Bytes const& bytes);

    // Uploads one; callers want `of`.
    explicit DeviceData(Bytes const& bytes);
    ~DeviceData();
    DeviceData(DeviceData const&) = delete;
    DeviceData& operator=(DeviceData const&) = delete;

    unsigned char const* data() const noexcept
    {
        return static_cast<unsigned char const*>(mDevice);
    }

private:
    void* mDevice{nullptr};
};

} // namespace iq
