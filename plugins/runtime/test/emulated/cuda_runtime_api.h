// As much of CUDA as the kernels use, on the CPU: the threads of a block are coroutines, of which
// one runs until it waits for others. A launch returns when all blocks are done.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
using cudaStream_t = void*;

struct dim3
{
    dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1)
        : x(x_)
        , y(y_)
        , z(z_)
    {
    }

    unsigned int x;
    unsigned int y;
    unsigned int z;
};

struct alignas(16) uint4
{
    unsigned int x{0}, y{0}, z{0}, w{0};
};

extern dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulated
{

// Ends the process with a message if threads wait for each other for ever.
void run(dim3 grid, dim3 block, std::function<void()> const& kernel);
void waitForBlock();
// Of each lane of the warp what it gave; good until the warp's next but one exchange.
uint64_t const* exchange(uint64_t mine);

template <typename Value>
Value lane(Value mine, int from)
{
    static_assert(sizeof(Value) <= sizeof(uint64_t));
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &mine, sizeof(mine));
    bits = exchange(bits)[from];
    __builtin_memcpy(&mine, &bits, sizeof(mine));
    return mine;
}

template <typename... Parameters, size_t... at>
std::function<void()> bound(
    void (*kernel)(Parameters...), void** arguments, std::index_sequence<at...> /*order*/)
{
    std::tuple<Parameters...> const values(*static_cast<Parameters*>(arguments[at])...);
    return [kernel, values] { std::apply(kernel, values); };
}

} // namespace emulated

template <typename... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments,
    size_t /*shared*/, cudaStream_t /*stream*/)
{
    emulated::run(
        grid, block, emulated::bound(kernel, arguments, std::index_sequence_for<Parameters...>()));
    return cudaSuccess;
}

inline void __syncthreads()
{
    emulated::waitForBlock();
}

template <typename Value>
Value __shfl_sync(unsigned int /*lanes*/, Value mine, int from)
{
    return emulated::lane(mine, from);
}

template <typename Value>
Value __shfl_xor_sync(unsigned int /*lanes*/, Value mine, int bits)
{
    return emulated::lane(mine, static_cast<int>(threadIdx.x % 32) ^ bits);
}

template <typename Value>
Value __shfl_up_sync(unsigned int /*lanes*/, Value mine, int by)
{
    int const self = static_cast<int>(threadIdx.x % 32);
    return emulated::lane(mine, self >= by ? self - by : self);
}

inline unsigned int __ballot_sync(unsigned int /*lanes*/, bool vote)
{
    uint64_t const* const votes = emulated::exchange(vote ? 1 : 0);
    unsigned int result = 0;
    for (int i = 0; i < 32; ++i)
    {
        result |= static_cast<unsigned int>(votes[i]) << i;
    }
    return result;
}

template <typename Value>
Value atomicAdd(Value* at, Value value)
{
    Value const before = *at;
    *at += value;
    return before;
}

inline int __popc(unsigned int bits)
{
    return __builtin_popcount(bits);
}

inline int __ffs(int bits)
{
    return __builtin_ffs(bits);
}

inline int __clz(int bits)
{
    return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned int>(bits));
}
