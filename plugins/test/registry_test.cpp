// A stand-in for libnvinfer.so: a registry that prints what is registered. No enterprise TensorRT
// can be installed where the tests run, and the registry of TensorRT for RTX is laid out otherwise.

#include <NvInferRuntime.h>

#include <cstdio>

// The registry's deprecated functions are pure too.
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

#ifndef IQ_STAND_IN_MAJOR
#define IQ_STAND_IN_MAJOR NV_TENSORRT_MAJOR
#endif

namespace
{
using namespace nvinfer1;

class Registry : public IPluginRegistry
{
public:
    bool registerCreator(IPluginCreatorInterface& creator, AsciiChar const* space) noexcept override
    {
        auto const& known = static_cast<IPluginCreatorV3One const&>(creator);
        std::printf("%s %s %s %s\n", space, known.getPluginNamespace(), known.getPluginName(),
            known.getPluginVersion());
        return true;
    }

#if NV_TENSORRT_MAJOR < 11
    bool registerCreator(IPluginCreator&, AsciiChar const*) noexcept override
    {
        return false;
    }

    IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override
    {
        return nullptr;
    }

    IPluginCreator* getPluginCreator(
        AsciiChar const*, AsciiChar const*, AsciiChar const*) noexcept override
    {
        return nullptr;
    }

    bool deregisterCreator(IPluginCreator const&) noexcept override
    {
        return false;
    }
#endif

    void setErrorRecorder(IErrorRecorder*) noexcept override {}

    IErrorRecorder* getErrorRecorder() const noexcept override
    {
        return nullptr;
    }

    bool isParentSearchEnabled() const override
    {
        return false;
    }

    void setParentSearchEnabled(bool) override {}

    PluginLibraryHandle loadLibrary(AsciiChar const*) noexcept override
    {
        return nullptr;
    }

    void deregisterLibrary(PluginLibraryHandle) noexcept override {}

    IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept override
    {
        return nullptr;
    }

    IPluginCreatorInterface* getCreator(
        AsciiChar const*, AsciiChar const*, AsciiChar const*) noexcept override
    {
        return nullptr;
    }

    bool deregisterCreator(IPluginCreatorInterface const&) noexcept override
    {
        return false;
    }

    IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept override
    {
        return nullptr;
    }

    int32_t releasePluginResource(AsciiChar const*) noexcept override
    {
        return 0;
    }

#if NV_TENSORRT_VERSION >= 101000
    IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept override
    {
        return nullptr;
    }
#endif
};
} // namespace

extern "C" __attribute__((visibility("default"))) int32_t getInferLibMajorVersion() noexcept
{
    return IQ_STAND_IN_MAJOR;
}

extern "C" __attribute__((visibility("default"))) IPluginRegistry* getPluginRegistry() noexcept
{
    static Registry registry;
    return &registry;
}
