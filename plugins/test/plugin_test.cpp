// The plugin on a CPU, with a TensorRT and a CUDA that are fakes: what it refuses and says, that
// equal constants are on the device once, and that threads do not disturb each other.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <thread>

#include "fake_cuda.h"
#include "fake_tensorrt.h"
#include "iq/op.h"

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators);
extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);

namespace
{

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using Plugin = std::unique_ptr<IPluginV3>;

iq::test::Log logged;
int failures = 0;

#define CHECK(condition) \
    do \
    { \
        if (!(condition)) \
        { \
            std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            ++failures; \
        } \
    } while (false)

void checkSaid(std::string const& words, int line)
{
    for (auto const& text : logged.take())
    {
        if (text.find(words) != std::string::npos && text.find("'a node'") != std::string::npos)
        {
            return;
        }
    }
    std::printf("line %d: nobody said of 'a node': %s\n", line, words.c_str());
    ++failures;
}
#define CHECK_SAID(words) checkSaid(words, __LINE__)

constexpr int32_t kHidden = 8;
std::vector<float> const kValues{0, 0, 90, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -90, 0, 0};
int32_t const kShape[]{2, kHidden};
int32_t const kSides[]{1, 6};
float const kSome = 0.5F;
int32_t const kBlockSize = 4;

PluginField fieldOf(std::string const& name)
{
    if (name == "templates")
    {
        return {"templates", kValues.data(), PluginFieldType::kFLOAT32, 16};
    }
    if (name == "template_shape")
    {
        return {"template_shape", kShape, PluginFieldType::kINT32, 2};
    }
    if (name == "channels")
    {
        return {"channels", kSides, PluginFieldType::kINT32, 2};
    }
    if (name == "block")
    {
        return {"block", &kBlockSize, PluginFieldType::kINT32, 1};
    }
    return {name == "threshold"     ? "threshold"
            : name == "epsilon"     ? "epsilon"
            : name == "scale"       ? "scale"
                                    : "factor",
        &kSome, PluginFieldType::kFLOAT32, 1};
}

nvinfer1::IPluginCreatorV3One& creatorOf(std::string const& name)
{
    int32_t count = 0;
    auto* const* const creators = getCreators(count);
    for (int32_t i = 0; i < count; ++i)
    {
        auto* const creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
        if (name == creator->getPluginName())
        {
            return *creator;
        }
    }
    std::printf("no creator %s\n", name.c_str());
    std::exit(1);
}

std::vector<PluginField> fieldsOf(std::string const& op)
{
    std::vector<PluginField> fields;
    auto const& wanted = *creatorOf(op).getFieldNames();
    for (int32_t i = 0; i < wanted.nbFields; ++i)
    {
        fields.push_back(fieldOf(wanted.fields[i].name));
    }
    return fields;
}

Plugin create(std::string const& op, std::vector<PluginField> const& fields)
{
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    return Plugin(creatorOf(op).createPlugin(
        "a node", &collection, nvinfer1::TensorRTPhase::kBUILD));
}

Plugin create(std::string const& op)
{
    return create(op, fieldsOf(op));
}

template <typename Capability>
Capability& as(Plugin const& plugin, PluginCapabilityType type)
{
    return *static_cast<Capability*>(plugin->getCapabilityInterface(type));
}

nvinfer1::IPluginV3OneBuild& build(Plugin const& plugin)
{
    return as<nvinfer1::IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}

nvinfer1::IPluginV3OneRuntime& runtime(Plugin const& plugin)
{
    return as<nvinfer1::IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

void testRoundTrip()
{
    CHECK(iq::opKinds().size() == 11);
    for (auto const* const kind : iq::opKinds())
    {
        Plugin const plugin = create(kind->name);
        CHECK(plugin != nullptr);
        auto const* const fields = runtime(plugin).getFieldsToSerialize();
        CHECK(fields->nbFields == static_cast<int32_t>(kind->fields.size()));
        Plugin const again(creatorOf(kind->name).createPlugin(
            "a node", fields, nvinfer1::TensorRTPhase::kRUNTIME));
        CHECK(again != nullptr);
        auto const& core = as<nvinfer1::IPluginV3OneCore>(again, PluginCapabilityType::kCORE);
        CHECK(core.getPluginNamespace() == std::string("iq"));
        CHECK(core.getPluginVersion() == std::string("1"));
        CHECK(build(again).getNbOutputs() == static_cast<int32_t>(kind->outputs.size()));
    }
    CHECK(logged.take().empty());
}

// `change` spoils the fields of `op`.
void refused(std::string const& op, std::function<void(std::vector<PluginField>&)> change,
    std::string const& words, int line)
{
    auto fields = fieldsOf(op);
    change(fields);
    CHECK(create(op, fields) == nullptr);
    checkSaid(words, line);
}
#define REFUSED(op, change, words) \
    refused(op, [&](std::vector<PluginField>& f) { change; }, words, __LINE__)

void testFieldsAreRefused()
{
    float const inf = std::numeric_limits<float>::infinity(), nan = inf - inf, minus = -1, zero = 0;
    int32_t const large[]{INT32_MAX, INT32_MAX}, three = 3, twice[]{1, 1}, below[]{-1, 0};
    int64_t const huge[]{1LL << 40, 1};
    std::string const norm = "AddRmsNormInsertQuantize", gated = "SiluMulSideQuantize";
    // Fields of norm: epsilon, scale, templates, template_shape;
    // of gated: block, factor, scale, channels.
    REFUSED(norm, f.pop_back(), "field 'template_shape' is missing");
    REFUSED(norm, f.push_back(f[0]), "field 'epsilon' is there twice");
    REFUSED(norm, f.emplace_back("colour"), "field 'colour' is unknown");
    REFUSED(norm, f.emplace_back(nullptr), "field '(no name)' is unknown");
    REFUSED(norm, f[0].data = &minus, "field 'epsilon' is negative or not finite");
    REFUSED(norm, f[0].data = &nan, "field 'epsilon' is negative or not finite");
    REFUSED(norm, f[0].data = nullptr, "field 'epsilon' has no data");
    REFUSED(norm, f[0].length = -1, "field 'epsilon' has no data, or a negative length");
    REFUSED(norm, f[0].length = 0, "field 'epsilon' has 0 values, not one");
    REFUSED(norm, f[0].type = PluginFieldType::kINT32, "field 'epsilon' is not of type float");
    REFUSED(norm, f[1].data = &zero, "field 'scale' is not a number from 1e-15 to 1e15");
    REFUSED(norm, f[1].data = &minus, "field 'scale' is not a number from 1e-15 to 1e15");
    REFUSED(norm, f[1].data = &inf, "field 'scale' is not a number from 1e-15 to 1e15");
    REFUSED(norm, f[2].length = 15, "templates has 15 values, which is not template_shape 2 x 8");
    REFUSED(norm, f[3].data = large, "16 values, which is not template_shape 2147483647 x");
    REFUSED(norm, f[3].length = 1, "field 'template_shape' is not [templates, hidden]");
    REFUSED(norm, (f[3] = {"template_shape", huge, PluginFieldType::kINT64, 2}), "beyond 32 bits");
    REFUSED(gated, f[0].data = &three, "field 'block' is not a power of two");
    auto const real = PluginFieldType::kFLOAT32;
    REFUSED(gated, f[0].type = real, "field 'block' is not of an integer type");
    REFUSED(gated, f[3].data = twice, "field 'channels' has a negative channel, or one twice");
    REFUSED(gated, f[3].data = below, "field 'channels' has a negative channel, or one twice");
    REFUSED(gated, f[3].data = large, "field 'channels' has a negative channel, or one twice");
    REFUSED(gated, (f[3].data = large, f[3].length = 1), "field 'channels' has a channel beyond");
    REFUSED("SinkDetect", f[2].data = &nan, "field 'threshold' is not a number");
    auto spoilt = kValues;
    spoilt[3] = nan;
    REFUSED(norm, f[2].data = spoilt.data(), "field 'templates' has a value that is not finite");
    CHECK(creatorOf(norm).createPlugin("a node", nullptr, nvinfer1::TensorRTPhase::kBUILD)
        == nullptr);
    CHECK_SAID("there is no collection of fields");
}

Dims dims(std::vector<int64_t> const& sizes)
{
    Dims found{};
    found.nbDims = static_cast<int32_t>(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i)
    {
        found.d[i] = static_cast<decltype(+found.d[0])>(sizes[i]);
    }
    return found;
}

int32_t configure(Plugin const& plugin, std::vector<std::vector<int64_t>> const& shapes)
{
    std::vector<DynamicPluginTensorDesc> in(shapes.size()), out(2);
    for (size_t i = 0; i < shapes.size(); ++i)
    {
        in[i].desc.dims = dims(shapes[i]);
    }
    return build(plugin).configurePlugin(in.data(), static_cast<int32_t>(in.size()), out.data(),
        build(plugin).getNbOutputs());
}

void testShapesAreRefused()
{
    Plugin const norm = create("AddRmsNormInsertQuantize"), gated = create("SiluMulSideQuantize");
    CHECK(configure(norm, {{-1, -1, 8}, {-1, -1, 8}, {8}, {-1, -1}}) == 0);
    CHECK(configure(gated, {{1, 5, 8}, {1, 5, 8}}) == 0);
    CHECK(logged.take().empty());
    CHECK(configure(norm, {{1, 5, 8}, {1, 5, 8}, {8}}) != 0);
    CHECK_SAID("has 3 inputs and 2 outputs, not 4 and 2");
    CHECK(configure(norm, {{1, 5, 4}, {1, 5, 4}, {4}, {1, 5}}) != 0);
    CHECK_SAID("the last axis of 'x' has 4 elements, a template 8");
    CHECK(configure(norm, {{1, 5, 8}, {1, 5, 8}, {7}, {1, 5}}) != 0);
    CHECK_SAID("input 'weight' has the shape [7], not [8]");
    CHECK(configure(norm, {{1, 5, 8}, {1, 5, 8}, {8}, {5}}) != 0);
    CHECK_SAID("input 'index' has the shape [5], not [1, 5]");
    CHECK(configure(norm, {{}, {}, {8}, {}}) != 0);
    CHECK_SAID("input 'x' has no axis");
    CHECK(configure(gated, {{1, 5, 10}, {1, 5, 10}}) != 0);
    CHECK_SAID("the last axis of 'gate' has 10 elements, no multiple of block 4");
    CHECK(configure(gated, {{1, 5, 4}, {1, 5, 4}}) != 0);
    CHECK_SAID("the last axis of 'gate' has 4 elements, no side channel 6");
}

void testTypesAreRefused()
{
    Plugin const norm = create("AddRmsNormInsertQuantize");
    DataType out[2]{};
    DataType in[]{DataType::kHALF, DataType::kHALF, DataType::kHALF, DataType::kINT32};
    CHECK(build(norm).getOutputDataTypes(out, 2, in, 4) == 0);
    CHECK(out[0] == DataType::kHALF && out[1] == DataType::kINT8);
    in[3] = DataType::kINT64;
    CHECK(build(norm).getOutputDataTypes(out, 2, in, 4) != 0);
    CHECK_SAID("input 'index' is of type int64, not int32");
    in[0] = DataType::kINT8;
    CHECK(build(norm).getOutputDataTypes(out, 2, in, 4) != 0);
    CHECK_SAID("input 'x' is of type int8, not float, half or bfloat16");
    DynamicPluginTensorDesc all[6]{};
    for (auto& desc : all)
    {
        desc.desc.type = DataType::kBF16;
    }
    CHECK(build(norm).supportsFormatCombination(0, all, 4, 2));
    CHECK(!build(norm).supportsFormatCombination(3, all, 4, 2));
    CHECK(!build(norm).supportsFormatCombination(5, all, 4, 2));
    all[5].desc.type = DataType::kINT8;
    CHECK(build(norm).supportsFormatCombination(5, all, 4, 2));
    CHECK(!build(norm).supportsFormatCombination(6, all, 4, 2));
    all[0].desc.format = nvinfer1::TensorFormat::kCHW4;
    CHECK(!build(norm).supportsFormatCombination(0, all, 4, 2));
}

// The index that SinkDetect finds for one row, as TensorRT would run it; -1 if it fails.
int32_t detected(
    Plugin const& plugin, int64_t spike, float value, bool shapesChange = false)
{
    float x[kHidden]{};
    x[spike] = value;
    bool const first = false, valid = true;
    int32_t index = -1;
    PluginTensorDesc desc[3]{};
    desc[0].dims = dims({1, 1, kHidden});
    desc[0].type = DataType::kFLOAT;
    desc[1].dims = desc[2].dims = dims({1, 1});
    if (shapesChange && runtime(plugin).onShapeChange(desc, 3, nullptr, 1) != 0)
    {
        return -1;
    }
    void const* const inputs[]{x, &first, &valid};
    void* const outputs[]{&index};
    int32_t const status
        = runtime(plugin).enqueue(desc, nullptr, inputs, outputs, nullptr, nullptr);
    return status == 0 ? index : -1;
}

void testConstantsAreSharedAndReleased()
{
    Plugin const one = create("SinkDetect"), two = create("SinkDetect");
    Plugin const other = create("SiluMulSideQuantize"), none = create("SiluMulQuantize");
    CHECK(detected(one, 2, 100) == -1);
    CHECK_SAID("enqueued before it was attached to a context");
    {
        iq::test::Context first, second;
        Plugin const a(runtime(one).attachToContext(&first));
        Plugin const b(runtime(one).attachToContext(&second));
        Plugin const c(runtime(two).attachToContext(&first)), d(a->clone());
        CHECK(iq::test::liveAllocations() == 1);
        Plugin const e(runtime(other).attachToContext(&first));
        Plugin const f(runtime(none).attachToContext(&first));
        CHECK(iq::test::liveAllocations() == 2);
        for (auto const* const plugin : {&a, &b, &c, &d})
        {
            CHECK(detected(*plugin, 2, 100) == 1);
            CHECK(detected(*plugin, 5, -100) == 2);
            CHECK(detected(*plugin, 5, 0.1F) == 0);
        }
    }
    CHECK(iq::test::liveAllocations() == 0);
    CHECK(logged.take().empty());
}

void testThreads()
{
    Plugin const plugin = create("SinkDetect");
    std::vector<std::thread> threads;
    for (int i = 0; i < 8; ++i)
    {
        threads.emplace_back([&plugin] {
            for (int round = 0; round < 200; ++round)
            {
                iq::test::Context context;
                Plugin const mine(runtime(plugin).attachToContext(&context));
                Plugin const copy(mine->clone());
                CHECK(detected(mine, 2, 100) == 1 && detected(copy, 5, -100) == 2);
                CHECK(runtime(plugin).getFieldsToSerialize()->nbFields == 3);
            }
        });
    }
    for (auto& thread : threads)
    {
        thread.join();
    }
    CHECK(iq::test::liveAllocations() == 0);
}

// A builder may time a plugin that it attached to no context; shapes it always tells.
void testTimedWithoutAContext()
{
    Plugin const plugin = create("SinkDetect");
    CHECK(detected(plugin, 2, 100, true) == 1);
    CHECK(detected(plugin, 5, -100) == 2);
    CHECK(iq::test::liveAllocations() == 1);
    CHECK(logged.take().empty());
}

// CUDA's runtime returns the last error of a thread once more, at the next launch.
void testFailedAllocationIsOver()
{
    Plugin const plugin = create("SinkDetect"), other = create("SinkDetect");
    iq::test::Context context;
    Plugin const working(runtime(other).attachToContext(&context));
    iq::test::failNextAllocation();
    Plugin const silu = create("SiluMulSideQuantize");
    CHECK(runtime(silu).attachToContext(&context) == nullptr);
    CHECK_SAID("no device memory for the constants");
    CHECK(detected(working, 2, 100) == 1);
}

// Finders and loggers are laid out by major version: one of another must not be called.
void testLoggerOfAnotherVersion()
{
    iq::test::majorVersion = NV_TENSORRT_MAJOR + 1;
    setLoggerFinder(&logged);
    CHECK(detected(create("SinkDetect"), 2, 100) == -1);
    CHECK(logged.take().empty());
    iq::test::majorVersion = NV_TENSORRT_MAJOR;
    setLoggerFinder(&logged);
    CHECK(detected(create("SinkDetect"), 2, 100) == -1);
    CHECK_SAID("enqueued before it was attached to a context");
}

} // namespace

int main()
{
    setLoggerFinder(&logged);
    testRoundTrip();
    testFieldsAreRefused();
    testShapesAreRefused();
    testTypesAreRefused();
    testConstantsAreSharedAndReleased();
    testThreads();
    testTimedWithoutAContext();
    testFailedAllocationIsOver();
    testLoggerOfAnotherVersion();
    setLoggerFinder(nullptr);
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
