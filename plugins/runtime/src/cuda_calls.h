// Calls of the CUDA runtime that throw, and what they give as owners.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>

#include <cuda_runtime_api.h>

#include "refusal.h"

namespace iq
{

inline void check(cudaError_t status, char const* what)
{
    if (status != cudaSuccess)
    {
        static_cast<void>(cudaGetLastError()); // else the next launch of this thread returns it
        throw Refusal(
            ErrorCode::kEngine, std::string(what) + " failed: " + cudaGetErrorString(status));
    }
}

template <auto Function>
struct Call
{
    template <typename Pointer>
    void operator()(Pointer pointer) const noexcept
    {
        static_cast<void>(Function(pointer));
    }
};

using Stream = std::unique_ptr<CUstream_st, Call<cudaStreamDestroy>>;
using DeviceMemory = std::unique_ptr<void, Call<cudaFree>>;
using PinnedMemory = std::unique_ptr<void, Call<cudaFreeHost>>;
using Graph = std::unique_ptr<CUgraph_st, Call<cudaGraphDestroy>>;
using GraphExec = std::unique_ptr<CUgraphExec_st, Call<cudaGraphExecDestroy>>;

inline DeviceMemory allocate(int64_t bytes)
{
    void* memory = nullptr;
    // TensorRT takes no null address, also for an empty tensor.
    check(cudaMalloc(&memory, static_cast<size_t>(std::max<int64_t>(bytes, 1))), "cudaMalloc");
    return DeviceMemory(memory);
}

inline PinnedMemory allocatePinned(int64_t bytes)
{
    void* memory = nullptr;
    check(cudaMallocHost(&memory, static_cast<size_t>(bytes)), "cudaMallocHost");
    return PinnedMemory(memory);
}

} // namespace iq
