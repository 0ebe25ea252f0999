// The session of a library that was built where nvcc or TensorRT's headers are missing.
#include "iq/text_session.h"

namespace iq
{
namespace
{

Error absent()
{
    return {ErrorCode::kEngine,
        "this libiq_runtime was built without CUDA, it only checks bundles: build it where nvcc "
        "and TensorRT's headers are"};
}

} // namespace

struct Engine::State
{
};

struct TextSession::State
{
    std::vector<int64_t> tokens;
    std::string note;
};

std::optional<TensorRt> builtFor() noexcept
{
    return std::nullopt;
}

Engine::Engine(std::unique_ptr<State> state)
    : mState(std::move(state))
{
}

Engine::~Engine() = default;

Result<std::shared_ptr<Engine const>> Engine::load(
    std::shared_ptr<Bundle const> /*bundle*/, EngineOptions const& /*options*/)
{
    return absent();
}

TextSession::TextSession(std::unique_ptr<State> state)
    : mState(std::move(state))
{
}

TextSession::~TextSession() = default;

Result<std::unique_ptr<TextSession>> TextSession::create(
    std::shared_ptr<Engine const> /*engine*/, int32_t /*batch*/)
{
    return absent();
}

Status TextSession::prefill(
    std::vector<std::vector<int64_t>> const& /*prompts*/, Sampling const& /*sampling*/)
{
    return absent();
}

Status TextSession::decode()
{
    return absent();
}

std::vector<int64_t> const& TextSession::tokens() const noexcept
{
    return mState->tokens;
}

std::string const& TextSession::graphNote() const noexcept
{
    return mState->note;
}

} // namespace iq
