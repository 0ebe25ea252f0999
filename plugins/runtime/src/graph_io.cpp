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
constexpr int64_t kLargestVocab = int64_t{1} << 26;

[[noreturn]] void refuse(std::string const& message)
{
    throw Refusal(ErrorCode::kGraph, message);
}

int64_t bytesOf(std::string const& dtype)
{
    static std::map<std::string, int64_t> const kBytes{{"float32", 4}, {"float16", 2},
        {"bfloat16", 2}, {"int8", 1}, {"int32", 4}, {"int64", 8}};
    auto const found = kBytes.find(dtype);
    return found == kBytes.end() ? 0 : found->second;
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

CacheTensor readCache(TensorInfo const& past, Manifest const& manifest)
{
    CacheTensor cache{past.name, presentName(past.name), past.dtype, {}, 1, bytesOf(past.dtype)};
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
    TensorInfo const* const present = find(manifest.outputs, cache.present);
    if (present == nullptr || present->dtype != past.dtype)
    {
        refuse("'" + past.name + "' has no output '" + cache.present + "' of its type");
    }
    return cache;
}

} // namespace

GraphIo readGraphIo(Manifest const& manifest)
{
    GraphIo io;
    TensorInfo const* const ids = find(manifest.inputs, "input_ids");
    TensorInfo const* const logits = find(manifest.outputs, "logits");
    if (ids == nullptr || logits == nullptr)
    {
        refuse("the model is not a causal LM: it has no 'input_ids' or no 'logits'");
    }
    for (TensorInfo const& input : manifest.inputs)
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
        io.caches.push_back(readCache(input, manifest));
        io.bytesPerToken += io.caches.back().heads * io.caches.back().rowBytes;
    }
    if (io.caches.empty())
    {
        refuse("the model was exported without cache: it has no 'past_key_values.0.key'");
    }
    io.logitsDtype = logits->dtype;
    io.logitsBytes = bytesOf(logits->dtype);
    if (logits->shape.size() != 3 || startsWith(logits->dtype, "int") || io.logitsBytes == 0)
    {
        refuse("'logits' is not [batch, seq, vocabulary] of a float type");
    }
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
