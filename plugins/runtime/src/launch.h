// A kernel's launch as a function, so that other compilers take the kernels too: tests run them
// on a CPU.
#pragma once

#include <cuda_runtime_api.h>

namespace iq
{

template <typename Type>
struct Given
{
    using Is = Type;
};

template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
    typename Given<Parameters>::Is... values)
{
    void* arguments[] = {&values...};
    return cudaLaunchKernel(
        kernel, grid, dim3(static_cast<unsigned int>(threads)), arguments, 0, stream);
}

} // namespace iq
