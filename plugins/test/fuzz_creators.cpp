// Every creator is given malformed fields: none may crash, throw, or make a plugin that it cannot
// make again from what it serialises. With libFuzzer (clang) the bytes are its own; else a seeded
// generator makes them: iq_fuzz_creators RUNS SEED.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "fake_tensorrt.h"

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators);
extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
extern "C" int LLVMFuzzerTestOneInput(uint8_t const* data, size_t size);

namespace
{

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

constexpr size_t kMostFields = 8;
constexpr char const* kNames[]{"templates", "template_shape", "threshold", "epsilon", "scale",
    "factor", "block", "channels", "", "Templates", nullptr};
constexpr size_t kNameCount = sizeof(kNames) / sizeof(kNames[0]);

// Reads the fuzzer's bytes; zeros when they are used up.
class Source
{
public:
    Source(uint8_t const* data, size_t size)
        : mData(data)
        , mLeft(size)
    {
    }
    uint8_t byte()
    {
        if (mLeft == 0)
        {
            return 0;
        }
        --mLeft;
        return *mData++;
    }

private:
    uint8_t const* mData;
    size_t mLeft;
};

size_t bytesOf(PluginFieldType type)
{
    switch (type)
    {
    case PluginFieldType::kFLOAT64:
    case PluginFieldType::kINT64: return 8;
    case PluginFieldType::kFLOAT32:
    case PluginFieldType::kINT32: return 4;
    case PluginFieldType::kDIMS: return sizeof(nvinfer1::Dims);
    default: return 2;
    }
}

// A number as a field might have it, or any bits at all.
double numberFrom(Source& source)
{
    constexpr double kTelling[]{0, 1, 2, 4, 8, 512, 0.5, -1, 1e-30, 1e30, 3, 2147483647};
    uint8_t const choice = source.byte();
    return choice < 200 ? kTelling[choice % 12] : static_cast<double>(source.byte()) - 128;
}

// Writes `number` in the type; false for a type that no field has.
bool put(PluginFieldType type, double number, uint8_t* to)
{
    auto const small = static_cast<float>(number);
    auto const whole = static_cast<int64_t>(small < 1e18F && small > -1e18F ? small : 1e18F);
    auto const whole32 = static_cast<int32_t>(whole);
    switch (type)
    {
    case PluginFieldType::kFLOAT32: std::memcpy(to, &small, sizeof(small)); return true;
    case PluginFieldType::kINT32: std::memcpy(to, &whole32, sizeof(whole32)); return true;
    case PluginFieldType::kINT64: std::memcpy(to, &whole, sizeof(whole)); return true;
    default: return false;
    }
}

// The data of a field lies in memory of exactly its size: a sanitizer sees a read beyond it.
std::unique_ptr<uint8_t[]> dataFrom(Source& source, PluginFieldType type, size_t length)
{
    size_t const unit = bytesOf(type);
    auto data = std::make_unique<uint8_t[]>(length * unit);
    bool const raw = source.byte() % 8 == 0;
    for (size_t i = 0; i < length; ++i)
    {
        uint8_t* const to = data.get() + i * unit;
        if (!raw && put(type, numberFrom(source), to))
        {
            continue;
        }
        for (size_t j = 0; j < unit; ++j)
        {
            to[j] = source.byte();
        }
    }
    return data;
}

int made = 0;

void tryFields(nvinfer1::IPluginCreatorV3One& creator, PluginFieldCollection const* fields)
{
    std::unique_ptr<nvinfer1::IPluginV3> const plugin(
        creator.createPlugin("fuzz", fields, nvinfer1::TensorRTPhase::kBUILD));
    if (plugin == nullptr)
    {
        return;
    }
    ++made;
    std::unique_ptr<nvinfer1::IPluginV3> const copy(plugin->clone());
    auto* const runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(
        copy->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
    std::unique_ptr<nvinfer1::IPluginV3> const again(creator.createPlugin(
        nullptr, runtime->getFieldsToSerialize(), nvinfer1::TensorRTPhase::kRUNTIME));
    if (again == nullptr)
    {
        std::abort();
    }
}

iq::test::Log logged;
} // namespace

extern "C" int LLVMFuzzerTestOneInput(uint8_t const* data, size_t size)
{
    setLoggerFinder(&logged);
    Source source(data, size);
    int32_t count = 0;
    auto* const* const creators = getCreators(count);
    auto& creator = *static_cast<nvinfer1::IPluginCreatorV3One*>(creators[source.byte() % count]);
    auto const& known = *creator.getFieldNames();
    // Mostly the creator's own fields, so that something gets past the names.
    bool const own = source.byte() % 4 != 0;
    size_t const fieldCount
        = own ? static_cast<size_t>(known.nbFields) : source.byte() % kMostFields;
    std::vector<PluginField> fields;
    std::vector<std::unique_ptr<uint8_t[]>> owned;
    for (size_t i = 0; i < fieldCount; ++i)
    {
        PluginField const& wanted = known.fields[i % static_cast<size_t>(known.nbFields)];
        uint8_t const oddity = source.byte();
        auto const type = oddity < 230 && own ? wanted.type
                                              : static_cast<PluginFieldType>(source.byte() % 16);
        char const* const name = own ? wanted.name : kNames[source.byte() % kNameCount];
        bool const list = name != nullptr && std::strstr(name, "s") == name + std::strlen(name) - 1;
        size_t const length = own && oddity % 4 != 0 ? (list ? source.byte() % 20 : 1)
                                                     : source.byte() % 20;
        owned.push_back(dataFrom(source, type, length));
        bool const lying = oddity >= 250; // without data, or of a negative length
        fields.emplace_back(name, lying ? nullptr : owned.back().get(), type,
            oddity == 255 ? -static_cast<int32_t>(length) : static_cast<int32_t>(length));
    }
    uint8_t const whole = source.byte();
    PluginFieldCollection const collection{whole == 1 ? -1 : static_cast<int32_t>(fields.size()),
        whole == 2 ? nullptr : fields.data()};
    tryFields(creator, whole == 3 ? nullptr : &collection);
    logged.take();
    return 0;
}

#ifndef IQ_LIBFUZZER
int main(int argc, char** argv)
{
    int const runs = argc > 1 ? std::atoi(argv[1]) : 20000;
    std::mt19937 random(argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 0U);
    std::uniform_int_distribution<int> byte(0, 255);
    for (int run = 0; run < runs; ++run)
    {
        std::vector<uint8_t> data(static_cast<size_t>(16 + byte(random)));
        for (uint8_t& value : data)
        {
            value = static_cast<uint8_t>(byte(random));
        }
        LLVMFuzzerTestOneInput(data.data(), data.size());
    }
    std::printf("%d runs, %d plugins\n", runs, made);
    return 0;
}
#endif
