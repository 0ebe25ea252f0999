// What an Engine holds, for the sessions that run it.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include <NvInferRuntime.h>

#include "graph_io.h"
#include "iq/text_session.h"

namespace iq
{

// In the order of construction: a plan goes before the runtime that made it.
struct Engine::State
{
    std::shared_ptr<Bundle const> bundle;
    GraphInfo const* graph{nullptr};
    EngineInfo const* info{nullptr};
    GraphIo io;
    int32_t device{0};
    std::unique_ptr<nvinfer1::IRuntime> runtime;
    std::unique_ptr<nvinfer1::ICudaEngine> plan;
    std::mutex creating;

    State() = default;
    State(State const&) = delete;
    State& operator=(State const&) = delete;
    ~State();
    std::unique_ptr<nvinfer1::IExecutionContext> newContext();
    void openRuntime(std::string const& path);
    void loadPlugin();
    void deserialise();
};

// Throws a Refusal that ends with what TensorRT logged since the last one.
[[noreturn]] void refuse(std::string const& what);

} // namespace iq
