// What a session needs to know of the graph: its tensors as iq_export/run/ort.py reads them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "iq/bundle.h"

namespace iq
{

// The types of tensors that a session holds; the manifest knows more (`$defs` of its schema).
enum class TensorType
{
    kFloat,
    kFloat16,
    kBfloat16,
    kInt8,
    kInt32,
    kInt64,
};

// None for a name that is of no such type.
std::optional<TensorType> tensorType(std::string const& name);

// One tensor of the cache: `past` [batch, heads, past, head size] comes back as `present` with the
// new rows appended; a sink index is [batch, past], which is one head of one element.
struct CacheTensor
{
    std::string past;
    std::string present;
    std::vector<int64_t> shape; // with 0 for batch and for past
    int64_t heads{0};
    int64_t rowBytes{0}; // of one token in one head
};

struct GraphIo
{
    bool hasMask{false};
    bool hasPositions{false};
    std::vector<CacheTensor> caches;
    TensorType logitsType{TensorType::kFloat};
    int64_t logitsBytes{0}; // of one element
    int64_t vocab{0};
    int64_t bytesPerToken{0}; // of the whole cache, for one sequence
};

// Throws Refusal, naming the tensor, if the graph is no causal LM with a KV cache, or one with inputs
// that a session cannot fill.
GraphIo readGraphIo(GraphInfo const& graph);

// Throws Refusal if the profile cannot both prefill and decode.
void checkProfile(EngineInfo const& engine);

} // namespace iq
