#include "iq/device_data.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include <cuda_runtime_api.h>

namespace iq
{
namespace
{

void check(cudaError_t status, char const* what)
{
    if (status != cudaSuccess)
    {
        static_cast<void>(cudaGetLastError()); // else the next launch of this thread returns it
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
    }
}

struct Copies
{
    std::mutex mutex;
    std::map<std::pair<int, Bytes>, std::weak_ptr<DeviceData const>> byDevice;
};

// Never destroyed: an engine may outlive the statics of this library.
Copies& copies()
{
    static Copies& one = *new Copies;
    return one;
}

} // namespace

std::shared_ptr<DeviceData const> DeviceData::of(Bytes const& bytes)
{
    int device = 0;
    check(cudaGetDevice(&device), "no device");
    auto& all = copies();
    std::lock_guard<std::mutex> const lock(all.mutex);
    auto const found = all.byDevice.find({device, bytes});
    if (found != all.byDevice.end())
    {
        if (auto held = found->second.lock())
        {
            return held;
        }
    }
    auto const made = std::make_shared<DeviceData const>(bytes);
    for (auto entry = all.byDevice.begin(); entry != all.byDevice.end();)
    {
        entry = entry->second.expired() ? all.byDevice.erase(entry) : std::next(entry);
    }
    all.byDevice[{device, bytes}] = made;
    return made;
}

DeviceData::DeviceData(Bytes const& bytes)
{
    check(cudaMalloc(&mDevice, bytes.size()), "no device memory for the constants");
    cudaError_t copied = cudaMemcpy(mDevice, bytes.data(), bytes.size(), cudaMemcpyHostToDevice);
    if (copied == cudaSuccess)
    {
        // It may return before the copy from pageable memory is done, and streams that do not wait
        // for the default one would read too early.
        copied = cudaStreamSynchronize(nullptr);
    }
    if (copied != cudaSuccess)
    {
        static_cast<void>(cudaFree(mDevice));
        check(copied, "cannot copy the constants to the device");
    }
}

DeviceData::~DeviceData()
{
    // At the end of the process the driver may be gone already: nothing is left to free then.
    static_cast<void>(cudaFree(mDevice));
}

} // namespace iq
