// A driver and a TensorRT for tests: libcuda.so.1 and libnvinfer.so.10 in one.
//
// Whatever the plan, its model has two heads of key and value rows (half, four elements) and a sink
// index. It writes each token and its position into its cache rows. The next token is the sum of
// (token + 1) x (position + 1) over all rows that the mask shows, modulo the vocabulary: a wrong
// mask, position, window or cache row gives other tokens.
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include <NvInferRuntime.h>

#define IQ_FAKE extern "C" __attribute__((visibility("default")))

namespace
{

using namespace nvinfer1;

constexpr int64_t kVocab = 97;
constexpr int64_t kHeads = 2;
constexpr int64_t kSize = 4;

struct Tensor
{
    TensorIOMode mode;
    DataType type;
};

std::map<std::string, Tensor> const kTensors{
    {"input_ids", {TensorIOMode::kINPUT, DataType::kINT64}},
    {"attention_mask", {TensorIOMode::kINPUT, DataType::kINT64}},
    {"position_ids", {TensorIOMode::kINPUT, DataType::kINT64}},
    {"past_key_values.0.key", {TensorIOMode::kINPUT, DataType::kHALF}},
    {"past_key_values.0.value", {TensorIOMode::kINPUT, DataType::kHALF}},
    {"past_sinks.0", {TensorIOMode::kINPUT, DataType::kINT32}},
    {"logits", {TensorIOMode::kOUTPUT, DataType::kFLOAT}},
    {"present.0.key", {TensorIOMode::kOUTPUT, DataType::kHALF}},
    {"present.0.value", {TensorIOMode::kOUTPUT, DataType::kHALF}},
    {"present_sinks.0", {TensorIOMode::kOUTPUT, DataType::kINT32}},
};

// One run: sizes and addresses as they were when it was queued.
struct Step
{
    std::map<std::string, void*> at;
    int64_t batch;
    int64_t seq;
    int64_t past;

    template <typename T>
    T* get(char const* name) const
    {
        return static_cast<T*>(at.at(name));
    }

    // Appends rows of `elements` to each of `heads`; put(b, s, row) fills a new one.
    template <typename T, typename Put>
    void append(char const* from, char const* to, int64_t heads, int64_t elements, Put put) const
    {
        int64_t const total = past + seq;
        for (int64_t head = 0; head < batch * heads; ++head)
        {
            T* const rows = get<T>(to) + head * total * elements;
            std::memcpy(rows, get<T>(from) + head * past * elements,
                static_cast<size_t>(past * elements) * sizeof(T));
            for (int64_t s = 0; s < seq; ++s)
            {
                put(head / heads * seq + s, rows + (past + s) * elements);
            }
        }
    }

    void run() const
    {
        auto const* const ids = get<int64_t>("input_ids");
        auto const* const positions = get<int64_t>("position_ids");
        auto const half = [&](int64_t column, uint16_t* row) {
            row[0] = static_cast<uint16_t>(ids[column] + 1);
            row[1] = static_cast<uint16_t>(positions[column] + 1);
            row[2] = row[3] = 0;
        };
        append<uint16_t>("past_key_values.0.key", "present.0.key", kHeads, kSize, half);
        append<uint16_t>("past_key_values.0.value", "present.0.value", kHeads, kSize, half);
        append<int32_t>("past_sinks.0", "present_sinks.0", 1, 1, [&](int64_t column, int32_t* row) {
            *row = static_cast<int32_t>((ids[column] + 1) * (positions[column] + 1));
        });
        for (int64_t b = 0; b < batch; ++b)
        {
            for (int64_t s = 0; s < seq; ++s)
            {
                writeLogits(b, s);
            }
        }
    }

    void writeLogits(int64_t b, int64_t s) const
    {
        int64_t const total = past + seq;
        auto const* const mask = get<int64_t>("attention_mask") + b * total;
        int64_t sum = 0;
        bool same = true;
        for (int64_t column = 0; column <= past + s; ++column)
        {
            if (mask[column] == 0)
            {
                continue;
            }
            int64_t const whole = get<int32_t>("present_sinks.0")[b * total + column];
            for (char const* const name : {"present.0.key", "present.0.value"})
            {
                for (int64_t head = b * kHeads; head < (b + 1) * kHeads; ++head)
                {
                    auto const* const row
                        = get<uint16_t>(name) + (head * total + column) * kSize;
                    same = same && int64_t{row[0]} * row[1] == whole;
                }
            }
            sum += whole;
        }
        float* const logits = get<float>("logits") + (b * seq + s) * kVocab;
        for (int64_t token = 0; token < kVocab; ++token)
        {
            logits[token] = token == sum % kVocab ? 9.0F : 0.0F;
        }
        bool const overflow = std::getenv("IQ_FAKE_OVERFLOW") != nullptr && total > 20;
        if (!same || overflow)
        {
            logits[0] = std::strtof("nan", nullptr);
        }
    }
};

class Context final : public IExecutionContext
{
public:
    bool setTensorAddress(char const* name, void* address) noexcept override
    {
        mAddresses[name] = address;
        return kTensors.count(name) == 1 && address != nullptr;
    }

    bool setInputShape(char const* name, Dims const& dims) noexcept override
    {
        mShapes[name] = dims;
        return kTensors.count(name) == 1;
    }

    bool enqueueV3(cudaStream_t stream) noexcept override
    {
        if (stream->capturing && std::getenv("IQ_FAKE_NO_CAPTURE") != nullptr)
        {
            return false;
        }
        Dims const& ids = mShapes["input_ids"];
        Step const step{mAddresses, ids.d[0], ids.d[1], mShapes["past_sinks.0"].d[1]};
        Dims const& key = mShapes["past_key_values.0.key"];
        bool const good = mAddresses.size() == kTensors.size() && key.nbDims == 4
            && key.d[0] == step.batch && key.d[1] == kHeads && key.d[2] == step.past
            && key.d[3] == kSize && mShapes["attention_mask"].d[1] == step.past + step.seq
            && mShapes["position_ids"].d[1] == step.seq;
        if (good)
        {
            stream->submit([step] { step.run(); });
        }
        return good;
    }

private:
    std::map<std::string, void*> mAddresses;
    std::map<std::string, Dims> mShapes;
};

class Plan final : public ICudaEngine
{
public:
    TensorIOMode getTensorIOMode(char const* name) const noexcept override
    {
        auto const found = kTensors.find(name);
        return found == kTensors.end() ? TensorIOMode::kNONE : found->second.mode;
    }
    DataType getTensorDataType(char const* name) const noexcept override
    {
        return kTensors.at(name).type;
    }
    int32_t getNbIOTensors() const noexcept override
    {
        return static_cast<int32_t>(kTensors.size());
    }
    IExecutionContext* createExecutionContext() noexcept override
    {
        return new Context;
    }
};

class Registry final : public IPluginRegistry
{
public:
    void* loadLibrary(char const* path) noexcept override
    {
        mLoaded = path;
        return &mLoaded;
    }
    void* getCreator(char const* name, char const* version, char const* space) noexcept override
    {
        bool const known = std::string(name) == "SinkDetect" && std::string(version) == "1"
            && std::string(space) == "iq";
        return known && !mLoaded.empty() ? this : nullptr;
    }

private:
    std::string mLoaded;
};

class Runtime final : public IRuntime
{
public:
    explicit Runtime(ILogger& logger)
        : mLogger(logger)
    {
    }
    ICudaEngine* deserializeCudaEngine(void const* blob, size_t size) noexcept override
    {
        std::string const plan(static_cast<char const*>(blob), size);
        if (plan.find("lean runtime") != std::string::npos && !mHostCode)
        {
            mLogger.log(ILogger::Severity::kERROR, "host code is not allowed");
            return nullptr;
        }
        if (plan.rfind("plan", 0) != 0)
        {
            mLogger.log(ILogger::Severity::kERROR, "this is no plan");
            return nullptr;
        }
        return new Plan;
    }
    void setEngineHostCodeAllowed(bool allowed) noexcept override
    {
        mHostCode = allowed;
    }
    IPluginRegistry& getPluginRegistry() noexcept override
    {
        return mRegistry;
    }

private:
    ILogger& mLogger;
    Registry mRegistry;
    bool mHostCode{false};
};

} // namespace

IQ_FAKE void* createInferRuntime_INTERNAL(void* logger, int32_t /*version*/)
{
    return static_cast<IRuntime*>(new Runtime(*static_cast<ILogger*>(logger)));
}

IQ_FAKE int32_t getInferLibMajorVersion()
{
    return 10;
}

IQ_FAKE int32_t getInferLibMinorVersion()
{
    return 15;
}

IQ_FAKE int32_t getInferLibPatchVersion()
{
    return 1;
}

IQ_FAKE int32_t getInferLibBuildVersion()
{
    return 29;
}

IQ_FAKE int cuInit(unsigned int /*flags*/)
{
    return 0;
}

IQ_FAKE int cuDeviceGet(int* device, int ordinal)
{
    *device = ordinal;
    return ordinal == 0 ? 0 : 101;
}

// 75 asks for the major number of sm_87, 76 for the minor.
IQ_FAKE int cuDeviceGetAttribute(int* value, int attribute, int /*device*/)
{
    *value = attribute == 75 ? 8 : 7;
    return 0;
}
