// The few functions of the CUDA runtime that the plugin calls, on the host's memory: with them and
// host_launches.cpp the plugin runs where there is no GPU, under sanitizers.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <utility>

#include <cuda_runtime_api.h>

#include "fake_cuda.h"

namespace
{
constexpr size_t kAlignment = 256; // as cudaMalloc
std::atomic<int> allocations{0};
std::atomic<bool> failing{false};
thread_local cudaError_t last = cudaSuccess;
} // namespace

int iq::test::liveAllocations()
{
    return allocations;
}

void iq::test::failNextAllocation()
{
    failing = true;
}

extern "C" cudaError_t cudaMalloc(void** pointer, size_t bytes)
{
    if (failing.exchange(false))
    {
        return last = cudaErrorMemoryAllocation;
    }
    if (posix_memalign(pointer, kAlignment, bytes) != 0)
    {
        return cudaErrorMemoryAllocation;
    }
    ++allocations;
    return cudaSuccess;
}

extern "C" cudaError_t cudaFree(void* pointer)
{
    allocations -= pointer != nullptr;
    std::free(pointer);
    return cudaSuccess;
}

extern "C" cudaError_t cudaMemcpy(void* to, void const* from, size_t bytes, cudaMemcpyKind)
{
    if (bytes > 0)
    {
        std::memcpy(to, from, bytes);
    }
    return cudaSuccess;
}

extern "C" cudaError_t cudaGetLastError()
{
    return std::exchange(last, cudaSuccess);
}

extern "C" cudaError_t cudaStreamSynchronize(cudaStream_t)
{
    return cudaSuccess;
}

extern "C" cudaError_t cudaGetDevice(int* device)
{
    *device = 0;
    return cudaSuccess;
}

extern "C" cudaError_t cudaGetDeviceCount(int* count)
{
    *count = 0;
    return cudaSuccess;
}

extern "C" char const* cudaGetErrorString(cudaError_t)
{
    return "an error";
}
