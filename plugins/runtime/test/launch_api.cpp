// A C interface to the launches of step_kernels.h, for tools/gpu_check: all pointers are device
// pointers. Each launch returns a cudaError_t.
#include "step_kernels.h"

#define IQ_TEST extern "C" __attribute__((visibility("default")))

IQ_TEST int64_t iq_choose_bytes(int64_t batch, int64_t vocab)
{
    return iq::chooseBytes(batch, vocab);
}

IQ_TEST int iq_launch_choose(int type, void const* logits, int64_t batch, int64_t seq,
    int64_t vocab, float temperature, int32_t topK, float topP, uint64_t seed, uint64_t* draws,
    int64_t* ids, int64_t* chosen, void* workspace, cudaStream_t stream)
{
    return iq::launchChoose(static_cast<iq::LogitType>(type), logits, batch, seq, vocab,
        {temperature, topK, topP, seed}, draws, ids, chosen, workspace, stream);
}

IQ_TEST int iq_launch_moves(iq::CacheMove const* moves, int32_t count, int64_t batch, int64_t from,
    int64_t to, cudaStream_t stream)
{
    return iq::launchMoves(moves, count, batch, from, to, stream);
}

IQ_TEST int iq_launch_inputs(int64_t* valid, int64_t* mask, int64_t* positions, int64_t batch,
    int64_t seq, int64_t total, cudaStream_t stream)
{
    return iq::launchInputs(valid, mask, positions, batch, seq, total, stream);
}
