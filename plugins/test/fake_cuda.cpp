// The few functions of the CUDA runtime that the plugin calls, on the host's memory: with them and
// host_launches.cpp the plugin runs where there is no GPU, under sanitizers.
#include <cstdlib>
#include <cstring>

#include <cuda_runtime_api.h>

namespace
{
constexpr size_t kAlignment = 256; // as cudaMalloc
} // namespace

extern "C" cudaError_t cudaMalloc(void** pointer, size_t bytes)
{
    return posix_memalign(pointer, kAlignment, bytes) == 0 ? cudaSuccess
                                                           : cudaErrorMemoryAllocation;
}

extern "C" cudaError_t cudaFree(void* pointer)
{
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
