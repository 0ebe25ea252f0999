// Engine: from a checked bundle to a deserialised plan.
#include <cstddef>
#include <deque>

#include <dlfcn.h>

#include "cuda_calls.h"
#include "engine_state.h"
#include "machine.h"
#include "manifest.h"

namespace iq
{
namespace
{

constexpr size_t kKeptErrors = 6;

#ifdef TRT_MAJOR_RTX
constexpr Flavour kBuiltFlavour = Flavour::kRtx;
#else
constexpr Flavour kBuiltFlavour = Flavour::kEnterprise;
static_assert(NV_TENSORRT_VERSION >= 100300, "TensorRT's headers must be of 10.3 or later");
#endif

// TensorRT keeps the first logger it is given for its plugin registry: the process has but one.
class Logger final : public nvinfer1::ILogger
{
public:
    void log(Severity severity, char const* message) noexcept override
    {
        if (severity > Severity::kERROR || message == nullptr)
        {
            return;
        }
        try
        {
            std::lock_guard<std::mutex> const lock(mMutex);
            mErrors.emplace_back(message);
            if (mErrors.size() > kKeptErrors)
            {
                mErrors.pop_front();
            }
        }
        catch (...) // out of memory: TensorRT must not see it
        {
        }
    }

    // What was said since the last call, in one line.
    std::string take()
    {
        std::lock_guard<std::mutex> const lock(mMutex);
        std::string text;
        for (std::string const& error : mErrors)
        {
            text += (text.empty() ? "" : " | ") + error;
        }
        mErrors.clear();
        return text.empty() ? "TensorRT logged no error" : text;
    }

private:
    std::mutex mMutex;
    std::deque<std::string> mErrors;
};

Logger& logger()
{
    static auto* const instance = new Logger; // TensorRT may log while the process ends
    return *instance;
}

// Whether the manifest's name of a type is that of the plan's.
bool sameType(std::string const& name, nvinfer1::DataType inPlan)
{
    using nvinfer1::DataType;
    switch (inPlan)
    {
    case DataType::kFLOAT: return tensorType(name) == TensorType::kFloat;
    case DataType::kHALF: return tensorType(name) == TensorType::kFloat16;
    case DataType::kBF16: return tensorType(name) == TensorType::kBfloat16;
    case DataType::kINT8: return tensorType(name) == TensorType::kInt8;
    case DataType::kINT32: return tensorType(name) == TensorType::kInt32;
    case DataType::kINT64: return tensorType(name) == TensorType::kInt64;
    default: return false;
    }
}

// The plan's own tensors are those the manifest names for the graph, each of its type.
void checkTensors(nvinfer1::ICudaEngine const& engine, GraphInfo const& graph)
{
    std::vector<Mismatch> rows;
    auto const compare = [&](TensorInfo const& tensor, nvinfer1::TensorIOMode mode) {
        if (engine.getTensorIOMode(tensor.name.c_str()) != mode)
        {
            rows.push_back({tensor.name, "in the plan", "not there"});
        }
        else if (!sameType(tensor.dtype, engine.getTensorDataType(tensor.name.c_str())))
        {
            rows.push_back({tensor.name, tensor.dtype, "another type"});
        }
    };
    for (TensorInfo const& input : graph.inputs)
    {
        compare(input, nvinfer1::TensorIOMode::kINPUT);
    }
    for (TensorInfo const& output : graph.outputs)
    {
        compare(output, nvinfer1::TensorIOMode::kOUTPUT);
    }
    size_t const expected = graph.inputs.size() + graph.outputs.size();
    if (static_cast<size_t>(engine.getNbIOTensors()) != expected)
    {
        rows.push_back({"tensors of the plan", std::to_string(expected),
            std::to_string(engine.getNbIOTensors())});
    }
    if (!rows.empty())
    {
        throw Refusal(Error{
            ErrorCode::kEngine, "the plan is not of the graph that the manifest describes", rows});
    }
}

// Virtual functions stand in another order in the other flavour and in another major version: not
// one of them may be called.
void checkHeaders(EngineInfo const& info)
{
    TensorRt const built = *builtFor();
    if (info.tensorRt.flavour != built.flavour || info.tensorRt.version[0] != built.version[0])
    {
        throw Refusal(Error{ErrorCode::kEngine,
            "this libiq_runtime cannot run engine " + info.name
                + ": build it with the headers of that TensorRT",
            {{"TensorRT's headers", info.tensorRt.text(), built.text()}}});
    }
}

} // namespace

std::optional<TensorRt> builtFor() noexcept
{
    return TensorRt{kBuiltFlavour, {NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH, 0}};
}

void refuse(std::string const& what)
{
    throw Refusal(ErrorCode::kEngine, what + ": " + logger().take());
}

Engine::State::~State()
{
    static_cast<void>(cudaSetDevice(device)); // the plan goes on the device that it is on
}

std::unique_ptr<nvinfer1::IExecutionContext> Engine::State::newContext()
{
    std::lock_guard<std::mutex> const lock(creating);
    std::unique_ptr<nvinfer1::IExecutionContext> context(plan->createExecutionContext());
    if (!context)
    {
        refuse("TensorRT makes no execution context");
    }
    return context;
}

void Engine::State::openRuntime(std::string const& path)
{
    using Create = void* (*)(void*, int32_t);
    std::string why;
    void* const library = openTensorRt(kBuiltFlavour, NV_TENSORRT_MAJOR, path, why);
    auto const create = library == nullptr
        ? nullptr
        : reinterpret_cast<Create>(::dlsym(library, "createInferRuntime_INTERNAL"));
    if (create != nullptr)
    {
        runtime.reset(static_cast<nvinfer1::IRuntime*>(create(&logger(), NV_TENSORRT_VERSION)));
    }
    if (!runtime)
    {
        refuse("TensorRT makes no runtime");
    }
}

void Engine::State::loadPlugin()
{
    if (info->pluginEmbedded || info->versionCompatible)
    {
        // A library or TensorRT's lean runtime inside the plan, which its checksum covers.
        runtime->setEngineHostCodeAllowed(true);
    }
    if (info->form != Form::kPlugin || info->pluginEmbedded)
    {
        return;
    }
    nvinfer1::IPluginRegistry& registry = runtime->getPluginRegistry();
    std::string const path = bundle->path(kPluginName);
    if (registry.loadLibrary(path.c_str()) == nullptr
        || registry.getCreator("SinkDetect", kPluginVersion, "iq") == nullptr)
    {
        refuse(path + " gives no plugins of namespace iq, version " + kPluginVersion);
    }
}

void Engine::State::deserialise()
{
    Result<std::string> const content = bundle->read(info->plan);
    if (!content)
    {
        throw Refusal(content.error());
    }
    plan.reset(runtime->deserializeCudaEngine(content.value().data(), content.value().size()));
    if (!plan)
    {
        refuse("TensorRT does not take " + bundle->folder() + "/" + info->plan);
    }
}

Engine::Engine(std::unique_ptr<State> state)
    : mState(std::move(state))
{
}

Engine::~Engine() = default;

Result<std::shared_ptr<Engine const>> Engine::load(
    std::shared_ptr<Bundle const> bundle, EngineOptions const& options)
{
    using Loaded = std::shared_ptr<Engine const>;
    return guarded<Loaded>([&]() -> Result<Loaded> {
        Result<Probe> const probed = probeMachine(
            kBuiltFlavour, NV_TENSORRT_MAJOR, options.library, options.device);
        if (!probed)
        {
            return probed.error();
        }
        Probe const& probe = probed.value();
        Result<GraphInfo const*> const graph = bundle->graph(options.graph);
        if (!graph)
        {
            return graph.error();
        }
        Result<EngineInfo const*> const chosen
            = bundle->engine(*graph.value(), options.engine, probe.machine);
        if (!chosen)
        {
            return chosen.error();
        }
        checkHeaders(*chosen.value());
        checkProfile(*chosen.value());
        if (!probe.machine.tensorRt || !probe.machine.computeCapability)
        {
            return Error{ErrorCode::kEngine,
                "no engine can run here: "
                    + (probe.machine.tensorRt ? probe.whyNoDevice : probe.whyNoTensorRt)};
        }
        auto state = std::make_unique<State>();
        state->bundle = std::move(bundle);
        state->graph = graph.value();
        state->info = chosen.value();
        state->io = readGraphIo(*state->graph);
        state->device = options.device;
        check(cudaSetDevice(options.device), "cudaSetDevice");
        state->openRuntime(options.library);
        state->loadPlugin();
        state->deserialise();
        checkTensors(*state->plan, *state->graph);
        return Loaded(new Engine(std::move(state)));
    });
}

} // namespace iq
