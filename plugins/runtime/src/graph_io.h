// What a session needs to know of the graph: its tensors as iq_export/run/ort.py reads them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "iq/bundle.h"

namespace iq
{

// One tensor of the cache: `past` [batch, heads, past, head size] comes back as `present` with the
// new rows appended; a sink index is [batch, past], which is one head of one element.
struct CacheTensor
{
    std::string past;
    std::string present;
    std::string dtype;
    std::vector<int64_t> shape; // with 0 for batch and for past
    int64_t heads{0};
    int64_t rowBytes{0}; // of one token in one head
};

struct GraphIo
{
    bool hasMask{false};
    bool hasPositions{false};
    std::vector<CacheTensor> caches;
    std::string logitsDtype;
    int64_t logitsBytes{0}; // of one element
    int64_t vocab{0};
    int64_t bytesPerToken{0}; // of the whole cache, for one sequence
};

// Throws Refusal, naming the tensor, if the manifest describes no causal LM with a KV cache, or one
// with inputs that a session cannot fill.
GraphIo readGraphIo(Manifest const& manifest);

// Throws Refusal if the profile cannot both prefill and decode.
void checkProfile(EngineInfo const& engine);

} // namespace iq
