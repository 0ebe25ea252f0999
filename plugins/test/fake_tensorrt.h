// The parts of TensorRT that the plugin talks to, for programs that run it without one.
#pragma once

#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include <NvInferRuntime.h>

// What is deprecated is still to be overridden.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

namespace iq::test
{

// As TensorRT's, as far as resources go: counted by key, cloned on the first use.
class Registry final : public nvinfer1::IPluginRegistry
{
public:
    nvinfer1::IPluginResource* acquirePluginResource(
        char const* key, nvinfer1::IPluginResource* resource) noexcept override
    {
        std::lock_guard<std::mutex> const lock(mMutex);
        Entry& entry = mEntries[key];
        if (entry.users == 0)
        {
            entry.resource = resource->clone();
        }
        ++entry.users;
        return entry.resource;
    }
    int32_t releasePluginResource(char const* key) noexcept override
    {
        std::lock_guard<std::mutex> const lock(mMutex);
        auto const found = mEntries.find(key);
        if (found == mEntries.end())
        {
            return -1;
        }
        if (--found->second.users == 0)
        {
            found->second.resource->release();
            delete found->second.resource;
            mEntries.erase(found);
        }
        return 0;
    }
    size_t copies()
    {
        std::lock_guard<std::mutex> const lock(mMutex);
        return mEntries.size();
    }

    // Nobody calls these.
    bool registerCreator(nvinfer1::IPluginCreator&, char const*) noexcept override
    {
        return false;
    }
    nvinfer1::IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override
    {
        return nullptr;
    }
    nvinfer1::IPluginCreator* getPluginCreator(
        char const*, char const*, char const*) noexcept override
    {
        return nullptr;
    }
    void setErrorRecorder(nvinfer1::IErrorRecorder*) noexcept override {}
    nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override
    {
        return nullptr;
    }
    bool deregisterCreator(nvinfer1::IPluginCreator const&) noexcept override
    {
        return false;
    }
    bool isParentSearchEnabled() const override
    {
        return false;
    }
    void setParentSearchEnabled(bool) override {}
    PluginLibraryHandle loadLibrary(char const*) noexcept override
    {
        return nullptr;
    }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}
    bool registerCreator(nvinfer1::IPluginCreatorInterface&, char const*) noexcept override
    {
        return false;
    }
    nvinfer1::IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept override
    {
        return nullptr;
    }
    nvinfer1::IPluginCreatorInterface* getCreator(
        char const*, char const*, char const*) noexcept override
    {
        return nullptr;
    }
    bool deregisterCreator(nvinfer1::IPluginCreatorInterface const&) noexcept override
    {
        return false;
    }
    nvinfer1::IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept override
    {
        return nullptr;
    }

private:
    struct Entry
    {
        nvinfer1::IPluginResource* resource{nullptr};
        int users{0};
    };
    std::mutex mMutex;
    std::map<std::string, Entry> mEntries;
};

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

Registry& registry();

} // namespace iq::test

#pragma GCC diagnostic pop
