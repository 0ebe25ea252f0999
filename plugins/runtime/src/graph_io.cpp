#include "graph_io.h"

#include <algorithm>
#include <map>

#include "refusal.h"

namespace iq
{
namespace
{

// Bounds what a forged manifest could make us allocate for one token, and all arithmetic on it.
constexpr int64_t kLargestRow = int64_t{1} << 24;
constexpr int64_t kLargestVocab = int64_t{1} << 23; // sampling.h: so many weights have a sum

[[noreturn]] void refuse(std::string const& message)
{
    throw Refusal(ErrorCode::kGraph, message);
}

// Of one element.
int64_t bytesOf(TensorType type)
{
    switch (type)
    {
    case TensorType::kInt8: return 1;
    case TensorType::kFloat16:
    case TensorType::kBfloat16: return 2;
    case TensorType::kFloat:
    case TensorType::kInt32: return 4;
    case TensorType::kInt64: return 8;
    }
    return 0;
}

bool isFloat(TensorType type)
{
    return type == TensorType::kFloat || type == TensorType::kFloat16
        || type == TensorType::kBfloat16;
}

TensorInfo const* find(std::vector<TensorInfo> const& tensors, std::string const& name)
{
    auto const found = std::find_if(tensors.begin(), tensors.end(),
        [&name](TensorInfo const& tensor) { return tensor.name == name; });
    return found == tensors.end() ? nullptr : &*found;
}

bool isAxis(TensorInfo const& tensor, size_t axis, char const* name)
{
    auto const* const text = std::get_if<std::string>(&tensor.shape[axis]);
    return text != nullptr && *text == name;
}

int64_t sizeOf(TensorInfo const& tensor, size_t axis)
{
    auto const* const size = std::get_if<int64_t>(&tensor.shape[axis]);
    if (size == nullptr || *size < 1 || *size > kLargestVocab)
    {
        refuse("axis " + std::to_string(axis) + " of '" + tensor.name + "' has no usable size");
    }
    return *size;
}

bool startsWith(std::string const& text, std::string const& start)
{
    return text.compare(0, start.size(), start) == 0;
}

// present.N.key of past_key_values.N.key, present_sinks.N of past_sinks.N; empty for others.
std::string presentName(std::string const& past)
{
    for (auto const& [from, to] :
        {std::pair<std::string, std::string>{"past_key_values.", "present."},
            {"past_sinks.", "present_sinks."}})
    {
        if (startsWith(past, from))
        {
            return to + past.substr(from.size());
        }
    }
    return "";
}

CacheTensor readCache(TensorInfo const& past, GraphInfo const& graph)
{
    std::optional<TensorType> const type = tensorType(past.dtype);
    CacheTensor cache{past.name, presentName(past.name), {}, 1, type ? bytesOf(*type) : 0};
    bool const keys = past.shape.size() == 4;
    size_t const rows = keys ? 2 : 1;
    if ((!keys && past.shape.size() != 2) || !isAxis(past, 0, "batch")
        || !isAxis(past, rows, "past"))
    {
        refuse("'" + past.name + "' is not [batch, heads, past, size] or [batch, past]");
    }
    cache.shape = {0, 0};
    if (keys)
    {
        cache.heads = sizeOf(past, 1);
        int64_t const size = sizeOf(past, 3);
        cache.rowBytes *= size;
        cache.shape = {0, cache.heads, 0, size};
    }
    // The kernel that moves rows takes 4 or 16 bytes at a time.
    if (cache.rowBytes == 0 || cache.rowBytes % 4 != 0
        || cache.rowBytes > kLargestRow / cache.heads)
    {
        refuse("'" + past.name + "' has rows of a type or size that a session does not hold");
    }
    TensorInfo const* const present = find(graph.outputs, cache.present);
    if (present == nullptr || present->dtype != past.dtype)
    {
        refuse("'" + past.name + "' has no output '" + cache.present + "' of its type");
    }
    return cache;
}

} // namespace

std::optional<TensorType> tensorType(std::string const& name)
{
    // As manifest.schema.json has them: tests/bundle/test_schema.py compares.
    static std::map<std::string, TensorType> const kTypes{
        {"float", TensorType::kFloat},
        {"float16", TensorType::kFloat16},
        {"bfloat16", TensorType::kBfloat16},
        {"int8", TensorType::kInt8},
        {"int32", TensorType::kInt32},
        {"int64", TensorType::kInt64},
    };
    auto const found = kTypes.find(name);
    return found == kTypes.end() ? std::nullopt : std::optional<TensorType>(found->second);
}

GraphIo readGraphIo(GraphInfo const& graph)
{
    GraphIo io;
    TensorInfo const* const ids = find(graph.inputs, "input_ids");
    TensorInfo const* const logits = find(graph.outputs, "logits");
    if (ids == nullptr || logits == nullptr)
    {
        refuse("the model is not a causal LM: it has no 'input_ids' or no 'logits'");
    }
    for (TensorInfo const& input : graph.inputs)
    {
        bool const mask = input.name == "attention_mask";
        bool const positions = input.name == "position_ids";
        io.hasMask |= mask;
        io.hasPositions |= positions;
        if (mask || positions || input.name == "input_ids")
        {
            if (input.dtype != "int64" || input.shape.size() != 2)
            {
                refuse("'" + input.name + "' is not int64 with two axes");
            }
            continue;
        }
        if (presentName(input.name).empty())
        {
            refuse("a session does not know how to fill the input '" + input.name + "'");
        }
        io.caches.push_back(readCache(input, graph));
        io.bytesPerToken += io.caches.back().heads * io.caches.back().rowBytes;
    }
    if (io.caches.empty())
    {
        refuse("the model was exported without cache: it has no 'past_key_values.0.key'");
    }
    std::optional<TensorType> const type = tensorType(logits->dtype);
    if (logits->shape.size() != 3 || !type || !isFloat(*type))
    {
        refuse("'logits' is not [batch, seq, vocabulary] of a float type");
    }
    io.logitsType = *type;
    io.logitsBytes = bytesOf(*type);
    io.vocab = sizeOf(*logits, 2);
    return io;
}

void checkProfile(EngineInfo const& engine)
{
    if (engine.past.min != 0 || engine.seq.min != 1 || engine.past.max < 1)
    {
        throw Refusal(ErrorCode::kEngine,
            "engine " + engine.name + " cannot both prefill and decode: its profile must begin at "
            "past 0 and seq 1, rebuild it with --minShapes seq:1,past:0");
    }
}

} // namespace iq
