// TextSession: prefill and decode over a KV cache of fixed buffers.
#include "iq/text_session.h"

#include <algorithm>
#include <exception>

#include "cuda_calls.h"
#include "engine_state.h"
#include "step_kernels.h"

namespace iq
{
namespace
{

int64_t product(std::initializer_list<int64_t> factors)
{
    int64_t result = 1;
    for (int64_t const factor : factors)
    {
        if (__builtin_mul_overflow(result, factor, &result))
        {
            throw Refusal(ErrorCode::kGraph, "a tensor of this engine has more than 2^63 bytes");
        }
    }
    return result;
}

LogitType logitType(TensorType type)
{
    return type == TensorType::kFloat ? LogitType::kFloat
                                      : (type == TensorType::kFloat16 ? LogitType::kHalf
                                                                      : LogitType::kBFloat16);
}

} // namespace

// The buffers never move, so a captured graph stays good for as long as its shapes.
struct TextSession::State
{
    explicit State(std::shared_ptr<Engine const> owner)
        : engine(std::move(owner))
    {
    }
    State(State const&) = delete;
    State& operator=(State const&) = delete;
    ~State()
    {
        static_cast<void>(cudaSetDevice(shared.device));
        // What was queued still uses the buffers.
        if (stream)
        {
            static_cast<void>(cudaStreamSynchronize(stream.get()));
        }
    }

    std::shared_ptr<Engine const> engine;
    Engine::State& shared{*engine->mState};
    GraphIo const& io{shared.io};
    int64_t room{0}; // sequences
    int64_t capacity{0}; // rows of a window at most

    Stream stream;
    DeviceMemory ids, mask, positions, logits; // of a step
    DeviceMemory valid, draws, chosen;         // [batch]
    DeviceMemory workspace;                    // of sampling
    DeviceMemory moves;                        // CacheMove for every cache tensor
    std::vector<DeviceMemory> past, present;
    PinnedMemory hostIds;    // [batch, capacity]
    PinnedMemory hostValid;  // [batch]
    PinnedMemory hostChosen; // [batch]
    std::unique_ptr<nvinfer1::IExecutionContext> context;

    int64_t batch{0};  // sequences of this prefill; 0 before it, and after a failure
    int64_t window{0}; // rows of the cache that the next step reads
    int64_t used{0};   // of them, those of the longest sequence
    SamplingRule rule;
    std::vector<int64_t> tokens;

    GraphExec graph;     // of a decode step over `window`
    bool warm{false};    // one such step has run
    std::string graphNote;

    void allocateAll(int64_t sequences);
    void setTensor(char const* name, DeviceMemory const& memory);
    void setShape(std::string const& name, std::vector<int64_t> const& shape);
    void setShapes(int64_t seq, int64_t rows);
    void enqueueStep(int64_t seq, int64_t next, bool choosing);
    bool capture(int64_t next);
    void start(std::vector<std::vector<int64_t>> const& prompts);
    void read(int64_t longest);
    void step();
    void collect();
};

void TextSession::State::allocateAll(int64_t sequences)
{
    EngineInfo const& info = *shared.info;
    room = sequences;
    capacity = info.past.max;
    int64_t const seq = info.seq.max;
    int64_t const total = capacity + seq;
    cudaStream_t created = nullptr;
    check(cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking), "cudaStreamCreate");
    stream.reset(created);
    constexpr auto kId = static_cast<int64_t>(sizeof(int64_t));
    ids = allocate(product({room, seq, kId}));
    mask = allocate(product({room, total, kId}));
    positions = allocate(product({room, seq, kId}));
    logits = allocate(product({room, seq, io.vocab, io.logitsBytes}));
    valid = allocate(product({room, kId}));
    draws = allocate(product({room, kId}));
    chosen = allocate(product({room, kId}));
    workspace = allocate(chooseBytes(room, io.vocab));
    hostIds = allocatePinned(product({room, capacity, kId}));
    hostValid = allocatePinned(product({room, kId}));
    hostChosen = allocatePinned(product({room, kId}));
    std::vector<CacheMove> table;
    for (CacheTensor const& cache : io.caches)
    {
        past.push_back(allocate(product({room, cache.heads, capacity, cache.rowBytes})));
        present.push_back(allocate(product({room, cache.heads, total, cache.rowBytes})));
        table.push_back({present.back().get(), past.back().get(), cache.heads, cache.rowBytes});
    }
    size_t const bytes = table.size() * sizeof(CacheMove);
    moves = allocate(static_cast<int64_t>(bytes));
    check(cudaMemcpyAsync(
              moves.get(), table.data(), bytes, cudaMemcpyHostToDevice, stream.get()),
        "cudaMemcpyAsync");
    check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize"); // `table` ends here
    tokens.reserve(static_cast<size_t>(room));
    context = shared.newContext();
    setTensor("input_ids", ids);
    setTensor("logits", logits);
    if (io.hasMask)
    {
        setTensor("attention_mask", mask);
    }
    if (io.hasPositions)
    {
        setTensor("position_ids", positions);
    }
    for (size_t i = 0; i < io.caches.size(); ++i)
    {
        setTensor(io.caches[i].past.c_str(), past[i]);
        setTensor(io.caches[i].present.c_str(), present[i]);
    }
}

void TextSession::State::setTensor(char const* name, DeviceMemory const& memory)
{
    if (!context->setTensorAddress(name, memory.get()))
    {
        refuse(std::string("TensorRT takes no address for '") + name + "'");
    }
}

void TextSession::State::setShape(std::string const& name, std::vector<int64_t> const& shape)
{
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    if (!context->setInputShape(name.c_str(), dims))
    {
        refuse("TensorRT takes no such shape for '" + name + "'");
    }
}

void TextSession::State::setShapes(int64_t seq, int64_t rows)
{
    setShape("input_ids", {batch, seq});
    if (io.hasMask)
    {
        setShape("attention_mask", {batch, rows + seq});
    }
    if (io.hasPositions)
    {
        setShape("position_ids", {batch, seq});
    }
    for (CacheTensor const& cache : io.caches)
    {
        std::vector<int64_t> shape = cache.shape;
        shape[0] = batch;
        shape[shape.size() == 4 ? 2 : 1] = rows;
        setShape(cache.past, shape);
    }
}

// All that a step does on the device; the same calls run and are captured. `next` is the window
// that the step leaves.
void TextSession::State::enqueueStep(int64_t seq, int64_t next, bool choosing)
{
    int64_t const total = window + seq;
    cudaStream_t const queue = stream.get();
    auto* const newIds = static_cast<int64_t*>(ids.get());
    auto* const newChosen = static_cast<int64_t*>(chosen.get());
    check(launchInputs(static_cast<int64_t*>(valid.get()),
              io.hasMask ? static_cast<int64_t*>(mask.get()) : nullptr,
              io.hasPositions ? static_cast<int64_t*>(positions.get()) : nullptr, batch, seq, total,
              queue),
        "the kernel for masks and positions");
    if (!context->enqueueV3(queue))
    {
        refuse("TensorRT cannot run the step");
    }
    check(launchMoves(static_cast<CacheMove const*>(moves.get()),
              static_cast<int32_t>(io.caches.size()), batch, total, next, queue),
        "the kernel for the cache");
    if (!choosing)
    {
        return;
    }
    check(launchChoose(logitType(io.logitsType), logits.get(), batch, seq, io.vocab, rule,
              static_cast<uint64_t*>(draws.get()), newIds, newChosen, workspace.get(), queue),
        "the kernel for sampling");
    check(cudaMemcpyAsync(hostChosen.get(), newChosen, static_cast<size_t>(batch) * sizeof(int64_t),
              cudaMemcpyDeviceToHost, queue),
        "cudaMemcpyAsync");
}

// Captures a decode step; false, with a note, if it cannot be: it then runs as before.
bool TextSession::State::capture(int64_t next)
{
    cudaGraph_t captured = nullptr;
    cudaGraphExec_t ready = nullptr;
    check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal),
        "cudaStreamBeginCapture");
    std::string why;
    try
    {
        enqueueStep(1, next, true);
    }
    catch (Refusal const& refusal)
    {
        why = refusal.error.message;
    }
    catch (std::exception const&) // the capture must end, whatever happened
    {
        why = "out of memory"; // short enough to need none
    }
    cudaError_t status = cudaStreamEndCapture(stream.get(), &captured);
    Graph const owner(captured);
    if (why.empty() && status == cudaSuccess)
    {
        status = cudaGraphInstantiate(&ready, captured, 0);
    }
    graph.reset(ready);
    if (!graph)
    {
        static_cast<void>(cudaGetLastError()); // it was told, and is not sticky
        graphNote = "decode runs without a CUDA graph: "
            + (why.empty() ? cudaGetErrorString(status) : why);
    }
    return graph != nullptr;
}

// Prompts to the device, padded on the left, and the state of a new generation.
void TextSession::State::start(std::vector<std::vector<int64_t>> const& prompts)
{
    size_t longest = 0;
    for (auto const& prompt : prompts)
    {
        longest = std::max(longest, prompt.size());
    }
    auto* const id = static_cast<int64_t*>(hostIds.get());
    auto* const before = static_cast<int64_t*>(hostValid.get());
    std::fill(id, id + prompts.size() * longest, 0);
    for (size_t row = 0; row < prompts.size(); ++row)
    {
        size_t const padding = longest - prompts[row].size();
        std::copy(prompts[row].begin(), prompts[row].end(), id + row * longest + padding);
        before[row] = -static_cast<int64_t>(padding);
    }
    size_t const bytes = prompts.size() * sizeof(int64_t);
    check(cudaMemcpyAsync(valid.get(), before, bytes, cudaMemcpyHostToDevice, stream.get()),
        "cudaMemcpyAsync");
    check(cudaMemsetAsync(draws.get(), 0, bytes, stream.get()), "cudaMemsetAsync");
    batch = static_cast<int64_t>(prompts.size());
    read(static_cast<int64_t>(longest));
}

// Prefill in chunks that the engine's profile takes; the last one leaves a window for decoding.
void TextSession::State::read(int64_t longest)
{
    graph.reset();
    warm = false;
    window = 0;
    for (bool last = false; !last;)
    {
        int64_t const seq = chunkAfter(window, longest, shared.info->seq.max);
        last = window + seq == longest;
        check(cudaMemcpy2DAsync(ids.get(), static_cast<size_t>(seq) * sizeof(int64_t),
                  static_cast<int64_t const*>(hostIds.get()) + window,
                  static_cast<size_t>(longest) * sizeof(int64_t),
                  static_cast<size_t>(seq) * sizeof(int64_t), static_cast<size_t>(batch),
                  cudaMemcpyHostToDevice, stream.get()),
            "cudaMemcpy2DAsync");
        setShapes(seq, window);
        int64_t const next = last ? windowFor(longest, capacity) : window + seq;
        enqueueStep(seq, next, last);
        window = next;
    }
    used = longest;
    setShapes(1, window);
    collect();
}

void TextSession::State::step()
{
    int64_t const next = windowFor(used + 1, capacity);
    bool const steady = next == window;
    // The first step of a shape lets TensorRT prepare; from the second on it can be captured.
    if (steady && warm && !graph && graphNote.empty())
    {
        capture(next);
    }
    if (steady && graph)
    {
        check(cudaGraphLaunch(graph.get(), stream.get()), "cudaGraphLaunch");
    }
    else
    {
        enqueueStep(1, next, true);
    }
    warm = steady;
    ++used;
    if (!steady)
    {
        graph.reset();
        window = next;
        setShapes(1, window);
    }
    collect();
}

// Waits for the tokens.
void TextSession::State::collect()
{
    check(cudaStreamSynchronize(stream.get()), "the step");
    auto const* const newest = static_cast<int64_t const*>(hostChosen.get());
    tokens.assign(newest, newest + batch);
    if (std::find(tokens.begin(), tokens.end(), -1) != tokens.end())
    {
        throw Refusal(ErrorCode::kGraph,
            "the model's logits are not finite: it overflowed in half precision");
    }
}

namespace
{

void checkSampling(Sampling const& sampling)
{
    bool const good = sampling.temperature >= 0.0F && sampling.temperature < 1e6F
        && sampling.topK >= 0 && sampling.topP > 0.0F && sampling.topP <= 1.0F;
    if (!good)
    {
        throw Refusal(ErrorCode::kUsage,
            "sampling needs temperature >= 0, top-k >= 0 and top-p above 0 and up to 1");
    }
}

void checkPrompts(std::vector<std::vector<int64_t>> const& prompts, EngineInfo const& info,
    int64_t room, int64_t vocab)
{
    auto const count = static_cast<int64_t>(prompts.size());
    if (count < info.batch.min || count > room)
    {
        throw Refusal(ErrorCode::kUsage,
            "this session takes " + std::to_string(info.batch.min) + " to " + std::to_string(room)
                + " prompts, not " + std::to_string(count));
    }
    for (auto const& prompt : prompts)
    {
        if (prompt.empty() || static_cast<int64_t>(prompt.size()) > info.past.max)
        {
            throw Refusal(ErrorCode::kData,
                "a prompt has " + std::to_string(prompt.size())
                    + " tokens, the engine's cache holds 1 to " + std::to_string(info.past.max));
        }
        for (int64_t const id : prompt)
        {
            if (id < 0 || id >= vocab)
            {
                throw Refusal(ErrorCode::kData,
                    "a prompt holds a token id outside 0.." + std::to_string(vocab - 1));
            }
        }
    }
}

} // namespace

TextSession::TextSession(std::unique_ptr<State> state)
    : mState(std::move(state))
{
}

TextSession::~TextSession() = default;

Result<std::unique_ptr<TextSession>> TextSession::create(
    std::shared_ptr<Engine const> engine, int32_t batch)
{
    using Created = std::unique_ptr<TextSession>;
    return guarded<Created>([&]() -> Result<Created> {
        EngineInfo const& info = *engine->mState->info;
        if (batch < info.batch.min || batch > info.batch.max)
        {
            return Error{ErrorCode::kUsage,
                "engine " + info.name + " takes " + std::to_string(info.batch.min) + " to "
                    + std::to_string(info.batch.max) + " sequences, not " + std::to_string(batch)};
        }
        check(cudaSetDevice(engine->mState->device), "cudaSetDevice");
        auto state = std::make_unique<State>(std::move(engine));
        state->allocateAll(batch);
        return Created(new TextSession(std::move(state)));
    });
}

Status TextSession::prefill(
    std::vector<std::vector<int64_t>> const& prompts, Sampling const& sampling)
{
    State& state = *mState;
    Status status = guarded<std::monostate>([&]() -> Status {
        checkSampling(sampling);
        checkPrompts(prompts, *state.shared.info, state.room, state.io.vocab);
        check(cudaSetDevice(state.shared.device), "cudaSetDevice");
        state.rule = {sampling.temperature, sampling.topK, sampling.topP, sampling.seed};
        state.start(prompts);
        return std::monostate{};
    });
    state.batch = status ? state.batch : 0;
    return status;
}

Status TextSession::decode()
{
    State& state = *mState;
    Status status = guarded<std::monostate>([&]() -> Status {
        if (state.batch == 0)
        {
            return Error{ErrorCode::kUsage, "there is nothing to go on from: prefill first"};
        }
        if (state.used > state.capacity)
        {
            return Error{ErrorCode::kData,
                "the cache is full: the engine holds " + std::to_string(state.capacity)
                    + " tokens"};
        }
        check(cudaSetDevice(state.shared.device), "cudaSetDevice");
        state.step();
        return std::monostate{};
    });
    state.batch = status ? state.batch : 0;
    return status;
}

std::vector<int64_t> const& TextSession::tokens() const noexcept
{
    return mState->tokens;
}

std::string const& TextSession::graphNote() const noexcept
{
    return mState->graphNote;
}

} // namespace iq
