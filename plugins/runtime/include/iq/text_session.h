// Prefill and decode of a causal LM with TensorRT; all of it needs an NVIDIA GPU.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "iq/bundle.h"

namespace iq
{

// The TensorRT whose headers this library was compiled against; none if it was built without CUDA,
// and then Engine::load says so. A plan runs only in a library of its flavour and major version.
IQ_API std::optional<TensorRt> builtFor() noexcept;

struct EngineOptions
{
    std::string engine;  // empty: the one that fits the machine
    std::string library; // path of the TensorRT library; empty: by its usual name
    int32_t device{0};
    std::string graph; // empty: the only one
};

// A deserialised plan. Sessions of any thread share it.
//
// What an engine and its sessions do, their destructors too, makes the engine's device the thread's
// current one (cudaSetDevice) and leaves it so.
class IQ_API Engine
{
public:
    static Result<std::shared_ptr<Engine const>> load(
        std::shared_ptr<Bundle const> bundle, EngineOptions const& options = {});
    ~Engine();
    Engine(Engine const&) = delete;
    Engine& operator=(Engine const&) = delete;

private:
    friend class TextSession;
    struct State;
    explicit Engine(std::unique_ptr<State> state);

    std::unique_ptr<State> mState;
};

// Temperature 0 takes the likeliest token; topK 0 and topP 1 keep all. Tokens of equal logits are
// kept or left out together.
struct Sampling
{
    float temperature{0.0F};
    int32_t topK{0};
    float topP{1.0F};
    uint64_t seed{0};
};

// One KV cache and one stream: a session belongs to one thread at a time. All memory is allocated
// by `create`; of the steps, only the one that captures a CUDA graph allocates (see README.md).
class IQ_API TextSession
{
public:
    // Room for `batch` sequences and as many tokens as the engine's profile takes.
    static Result<std::unique_ptr<TextSession>> create(
        std::shared_ptr<Engine const> engine, int32_t batch = 1);
    ~TextSession();
    TextSession(TextSession const&) = delete;
    TextSession& operator=(TextSession const&) = delete;

    // Starts anew with these prompts, at most `batch` of them, and chooses a token for each.
    Status prefill(std::vector<std::vector<int64_t>> const& prompts, Sampling const& sampling);

    // One step on: the tokens chosen last are fed, and the next ones are chosen.
    Status decode();

    // The tokens chosen last, one for each prompt. A caller ignores those of a sequence that ended.
    std::vector<int64_t> const& tokens() const noexcept;

    // Why decode steps run without a CUDA graph; empty if nothing speaks against one.
    std::string const& graphNote() const noexcept;

private:
    struct State;
    explicit TextSession(std::unique_ptr<State> state);

    std::unique_ptr<State> mState;
};

} // namespace iq
