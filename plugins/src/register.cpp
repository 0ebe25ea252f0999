// Registration at dlopen, for hosts that open a plugin library and leave the rest to it: Triton's
// TensorRT backend does so with its option `plugins`.
//
// TensorRT asks for `getCreators` only where it loads the library itself, and registering a second
// time would be an error there. So this happens only where IQ_REGISTER_PLUGINS=1 asks for it. This
// file is linked last: its constructor runs when the constants of the others are there.

#include "iq/log.h"
#include "iq/op.h"

#include <NvInferRuntime.h>

#include <dlfcn.h>
#include <link.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

namespace iq
{
namespace
{
int collectTensorRt(dl_phdr_info* info, size_t /*size*/, void* names)
{
    char const* const slash = std::strrchr(info->dlpi_name, '/');
    std::string const base = slash == nullptr ? info->dlpi_name : slash + 1;
    if (base.rfind("libnvinfer.so", 0) == 0 || base.rfind("libtensorrt_rtx.so", 0) == 0)
    {
        static_cast<std::vector<std::string>*>(names)->emplace_back(info->dlpi_name);
    }
    return 0;
}

//! The TensorRT in this process, or nullptr. None is linked here, and hosts load theirs with
//! RTLD_LOCAL, so it is looked for among the libraries that are loaded.
void* findTensorRt()
{
    std::vector<std::string> names;
    ::dl_iterate_phdr(collectTensorRt, &names);
    for (std::string const& name : names)
    {
        void* const library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_NOLOAD);
        if (library != nullptr)
        {
            return library;
        }
    }
    return nullptr;
}

template <typename Function>
Function find(void* library, char const* name)
{
    auto const function = reinterpret_cast<Function>(::dlsym(library, name));
    if (function == nullptr)
    {
        throw std::runtime_error(std::string("the TensorRT that is loaded has no ") + name);
    }
    return function;
}

void registerCreators()
{
    void* const tensorRt = findTensorRt();
    if (tensorRt == nullptr)
    {
        throw std::runtime_error("no TensorRT is loaded yet");
    }
    // Creators are called by TensorRT, but its registry is called from here: its virtual functions
    // stand where these headers say only in the same major version (TensorRT for RTX has its own).
    int32_t const major = find<int32_t (*)()>(tensorRt, "getInferLibMajorVersion")();
    if (major != NV_TENSORRT_MAJOR)
    {
        throw std::runtime_error("the TensorRT that is loaded has major version "
            + std::to_string(major) + ", and the library was built with the headers of "
            + std::to_string(NV_TENSORRT_MAJOR));
    }
    using GetRegistry = nvinfer1::IPluginRegistry* (*)();
    auto* const registry = find<GetRegistry>(tensorRt, "getPluginRegistry")();
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* const creators = allCreators(count);
    for (int32_t i = 0; i < count; ++i)
    {
        if (!registry->registerCreator(*creators[i], kNamespace))
        {
            throw std::runtime_error("TensorRT refuses creator " + std::to_string(i));
        }
    }
}

__attribute__((constructor)) void registerAtLoad() noexcept
{
    char const* const wish = std::getenv("IQ_REGISTER_PLUGINS");
    if (wish == nullptr || std::strcmp(wish, "1") != 0)
    {
        return;
    }
    try
    {
        registerCreators();
    }
    catch (std::exception const& error)
    {
        logError(std::string("not registered, as IQ_REGISTER_PLUGINS=1 asks for: ") + error.what());
    }
}

} // namespace
} // namespace iq
