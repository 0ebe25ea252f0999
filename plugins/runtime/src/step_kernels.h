// The kernels between two runs of the engine. All pointers are device pointers; nothing
// synchronises, nothing allocates, all can be captured in a CUDA graph.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include "sampling.h"

namespace iq
{

enum class LogitType
{
    kFloat,
    kHalf,
    kBFloat16
};

// Rows of a cache tensor, from what the engine wrote to the window it reads next.
struct CacheMove
{
    void const* present{nullptr};
    void* past{nullptr};
    int64_t heads{0};
    int64_t rowBytes{0}; // a multiple of 4
};

// valid[b] as validAfter says, and from it mask [batch, total] and positions [batch, seq]; both may
// be null.
cudaError_t launchInputs(int64_t* valid, int64_t* mask, int64_t* positions, int64_t batch,
    int64_t seq, int64_t total, cudaStream_t stream);

// The last rows of `from` become the window of `to`, zeros in front.
cudaError_t launchMoves(CacheMove const* moves, int32_t count, int64_t batch, int64_t from,
    int64_t to, cudaStream_t stream);

// Bytes of workspace for up to `batch` sequences, one or more, of up to `vocab` tokens, which are at
// most 2^23.
int64_t chooseBytes(int64_t batch, int64_t vocab);

// A token for each sequence from its last row of logits [batch, seq, vocab], written to ids and to
// chosen, as test/serial.h says; draws[b] counts its draws. What the workspace holds before and
// after does not matter; it is aligned as cudaMalloc does it.
cudaError_t launchChoose(LogitType type, void const* logits, int64_t batch, int64_t seq,
    int64_t vocab, SamplingRule const& rule, uint64_t* draws, int64_t* ids, int64_t* chosen,
    void* workspace, cudaStream_t stream);

} // namespace iq
