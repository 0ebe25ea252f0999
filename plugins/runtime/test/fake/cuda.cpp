// The CUDA runtime and the kernels of a step, on the CPU.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "../serial.h"
#include "step_kernels.h"

cudaError_t cudaSetDevice(int device)
{
    return device == 0 ? cudaSuccess : cudaErrorFake;
}

cudaError_t cudaGetLastError()
{
    return cudaSuccess;
}

char const* cudaGetErrorString(cudaError_t /*error*/)
{
    return "a fault of the fake";
}

cudaError_t cudaMalloc(void** memory, size_t bytes)
{
    *memory = std::malloc(bytes);
    std::memset(*memory, 0xAB, bytes); // nothing may count on zeros
    return cudaSuccess;
}

cudaError_t cudaFree(void* memory)
{
    std::free(memory);
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void** memory, size_t bytes)
{
    return cudaMalloc(memory, bytes);
}

cudaError_t cudaFreeHost(void* memory)
{
    return cudaFree(memory);
}

cudaError_t cudaMemcpy(void* to, void const* from, size_t bytes, cudaMemcpyKind /*kind*/)
{
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(
    void* to, void const* from, size_t bytes, cudaMemcpyKind /*kind*/, cudaStream_t stream)
{
    stream->submit([=] { std::memcpy(to, from, bytes); });
    return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t toPitch, void const* from, size_t fromPitch,
    size_t width, size_t height, cudaMemcpyKind /*kind*/, cudaStream_t stream)
{
    stream->submit([=] {
        for (size_t row = 0; row < height; ++row)
        {
            std::memcpy(static_cast<char*>(to) + row * toPitch,
                static_cast<char const*>(from) + row * fromPitch, width);
        }
    });
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream)
{
    stream->submit([=] { std::memset(memory, value, bytes); });
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int /*flags*/)
{
    *stream = new CUstream_st;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    for (auto const& work : stream->queue)
    {
        work();
    }
    stream->queue.clear();
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, int /*mode*/)
{
    stream->capturing = true;
    stream->captured.clear();
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph)
{
    stream->capturing = false;
    *graph = new CUgraph_st{stream->captured};
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(
    cudaGraphExec_t* ready, cudaGraph_t graph, unsigned int /*flags*/)
{
    *ready = new CUgraphExec_st{graph->work};
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream)
{
    for (auto const& work : graph->work)
    {
        stream->submit(work);
    }
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph)
{
    delete graph;
    return cudaSuccess;
}

namespace iq
{

cudaError_t launchInputs(int64_t* valid, int64_t* mask, int64_t* positions, int64_t batch,
    int64_t seq, int64_t total, cudaStream_t stream)
{
    stream->submit([=] { serialInputs(valid, mask, positions, batch, seq, total); });
    return cudaSuccess;
}

cudaError_t launchMoves(CacheMove const* moves, int32_t count, int64_t batch, int64_t from,
    int64_t to, cudaStream_t stream)
{
    stream->submit([=] {
        for (int32_t i = 0; i < count; ++i)
        {
            serialMove(static_cast<unsigned char const*>(moves[i].present),
                static_cast<unsigned char*>(moves[i].past), batch * moves[i].heads,
                moves[i].rowBytes, from, to);
        }
    });
    return cudaSuccess;
}

int64_t chooseBytes(int64_t batch, int64_t /*vocab*/)
{
    return batch; // the serial form needs none
}

cudaError_t launchChoose(LogitType type, void const* logits, int64_t batch, int64_t seq,
    int64_t vocab, SamplingRule const& rule, uint64_t* draws, int64_t* ids, int64_t* chosen,
    void* /*workspace*/, cudaStream_t stream)
{
    if (type != LogitType::kFloat)
    {
        return cudaErrorFake;
    }
    stream->submit([=] {
        for (int64_t b = 0; b < batch; ++b)
        {
            SerialRow row(
                static_cast<float const*>(logits) + ((b + 1) * seq - 1) * vocab, vocab, rule);
            chosen[b] = row.choose(uniform(rule.seed, static_cast<uint64_t>(b), draws[b]++));
            ids[b] = chosen[b] < 0 ? 0 : chosen[b];
        }
    });
    return cudaSuccess;
}

} // namespace iq
