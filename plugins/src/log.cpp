#include "iq/log.h"

#include <atomic>
#include <cstdio>

#include <dlfcn.h>

// TensorRT for RTX counts its versions from 1.
#ifndef TRT_MAJOR_RTX
static_assert(NV_TENSORRT_VERSION >= 100300, "TensorRT's headers must be of 10.3 or later");
#endif

namespace iq
{
namespace
{
std::atomic<nvinfer1::ILoggerFinder*> loggerFinder{nullptr};

//! Major version of the TensorRT that `finder` is of, 0 where it does not say.
int32_t majorVersion(nvinfer1::ILoggerFinder const* finder)
{
    // There may be several in the process; its table of virtual functions tells which.
    Dl_info info{};
    void* library = nullptr;
    if (::dladdr(*reinterpret_cast<void const* const*>(finder), &info) != 0)
    {
        library = ::dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    }
    using Version = int32_t (*)();
    auto const version = reinterpret_cast<Version>(
        ::dlsym(library == nullptr ? RTLD_DEFAULT : library, "getInferLibMajorVersion"));
    int32_t const major = version == nullptr ? 0 : version();
    if (library != nullptr)
    {
        ::dlclose(library);
    }
    return major;
}
} // namespace

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    // Finders and loggers of TensorRT 10 and of 11 have their functions in other places, while
    // plugins and creators have not: with another version the plugin works, and logs to stderr.
    bool const known = finder != nullptr && majorVersion(finder) == NV_TENSORRT_MAJOR;
    loggerFinder = known ? finder : nullptr;
}

void logError(std::string const& message) noexcept
{
    auto* const finder = loggerFinder.load();
    auto* const logger = finder == nullptr ? nullptr : finder->findLogger();
    if (logger == nullptr)
    {
        std::fprintf(stderr, "iq plugins: %s\n", message.c_str());
        return;
    }
    logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
}

} // namespace iq
