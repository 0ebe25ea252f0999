// The parts of TensorRT that the plugin talks to, for programs that run it without one.
#pragma once

#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include <NvInferRuntime.h>

namespace iq::test
{

// What the fake says of itself.
inline int32_t majorVersion = NV_TENSORRT_MAJOR;

class Context final : public nvinfer1::IPluginResourceContext
{
public:
    nvinfer1::IGpuAllocator* getGpuAllocator() const noexcept override
    {
        return nullptr;
    }
    nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override
    {
        return nullptr;
    }
};

// Keeps what is logged.
class Log final : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder
{
public:
    void log(Severity, char const* message) noexcept override
    {
        std::lock_guard<std::mutex> const lock(mMutex);
        mLines.emplace_back(message);
    }
    nvinfer1::ILogger* findLogger() override
    {
        return this;
    }
    // What was logged since the last call.
    std::vector<std::string> take()
    {
        std::lock_guard<std::mutex> const lock(mMutex);
        return std::exchange(mLines, {});
    }

private:
    std::mutex mMutex;
    std::vector<std::string> mLines;
};

} // namespace iq::test

// One program includes this, so it is defined once; exported, because the plugin looks it up.
extern "C" __attribute__((visibility("default"))) int32_t getInferLibMajorVersion() noexcept
{
    return iq::test::majorVersion;
}
