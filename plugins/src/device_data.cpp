#include "iq/device_data.h"

#include <cstring>
#include <memory>
#include <stdexcept>

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <NvInferRuntime.h>

#include "iq/log.h"

namespace iq
{
namespace
{

void check(cudaError_t status, char const* what)
{
    if (status != cudaSuccess)
    {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
    }
}

// What the registry holds: it clones what it is given, and only clones are on the device.
class Resource final : public nvinfer1::IPluginResource
{
public:
    explicit Resource(Bytes const& bytes)
        : mBytes(bytes)
    {
    }

    nvinfer1::IPluginResource* clone() noexcept override
    {
        return guarded<nvinfer1::IPluginResource*>("constants", nullptr, [this] {
            auto copy = std::make_unique<Resource>(mBytes);
            copy->upload();
            return copy.release();
        });
    }

    int32_t release() noexcept override
    {
        // At the end of the process the driver may be gone already: nothing is left to free then.
        static_cast<void>(cudaFree(mDevice));
        mDevice = nullptr;
        return 0;
    }

    Bytes const& bytes() const noexcept
    {
        return mBytes;
    }
    unsigned char const* device() const noexcept
    {
        return static_cast<unsigned char const*>(mDevice);
    }

private:
    void upload()
    {
        void* device = nullptr;
        check(cudaMalloc(&device, mBytes.size()), "no device memory");
        cudaError_t const copied
            = cudaMemcpy(device, mBytes.data(), mBytes.size(), cudaMemcpyHostToDevice);
        if (copied != cudaSuccess)
        {
            static_cast<void>(cudaFree(device));
            check(copied, "cannot copy to the device");
        }
        mDevice = device;
    }

    Bytes mBytes;
    void* mDevice{nullptr};
};

// FNV-1a. Equal keys of different content are caught when the content is compared.
uint64_t hashOf(Bytes const& bytes)
{
    uint64_t hash = 14695981039346656037ULL;
    for (unsigned char const byte : bytes)
    {
        hash = (hash ^ byte) * 1099511628211ULL;
    }
    return hash;
}

} // namespace

DeviceData::DeviceData(nvinfer1::IPluginRegistry& registry, Bytes const& bytes)
    : mRegistry(registry)
{
    int device = 0;
    check(cudaGetDevice(&device), "no device");
    mKey = "iq." + std::to_string(device) + "." + std::to_string(bytes.size()) + "."
        + std::to_string(hashOf(bytes));
    Resource wanted(bytes);
    auto const* const found
        = static_cast<Resource*>(mRegistry.acquirePluginResource(mKey.c_str(), &wanted));
    if (found == nullptr)
    {
        throw std::runtime_error("the plugin registry has no copy of its constants");
    }
    if (found->bytes() != bytes)
    {
        static_cast<void>(mRegistry.releasePluginResource(mKey.c_str()));
        throw std::runtime_error("other constants are registered as '" + mKey + "'");
    }
    mData = found->device();
}

DeviceData::~DeviceData()
{
    static_cast<void>(mRegistry.releasePluginResource(mKey.c_str()));
}

nvinfer1::IPluginRegistry& registryOf(nvinfer1::IPluginResourceContext* context)
{
    if (context == nullptr)
    {
        throw std::runtime_error("there is no context to attach to");
    }
    // An object starts with the address of its table of virtual functions: in the library.
    void const* virtuals = nullptr;
    std::memcpy(&virtuals, static_cast<void const*>(context), sizeof(virtuals));
    Dl_info where{};
    if (dladdr(virtuals, &where) == 0)
    {
        throw std::runtime_error("the TensorRT library of the context is not found");
    }
    void* const library = dlopen(where.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    void* const symbol
        = dlsym(library == nullptr ? RTLD_DEFAULT : library, "getPluginRegistry");
    if (library != nullptr)
    {
        dlclose(library); // it stays loaded: it made the context
    }
    auto* const get = reinterpret_cast<nvinfer1::IPluginRegistry* (*) ()>(symbol);
    auto* const registry = get == nullptr ? nullptr : get();
    if (registry == nullptr)
    {
        throw std::runtime_error(
            std::string("no plugin registry in '") + where.dli_fname + "'");
    }
    return *registry;
}

} // namespace iq
