#include "step_kernels.h"

#include "launch.h"

namespace iq
{
namespace
{

constexpr int kThreads = 512;
constexpr unsigned int kMoveSlices = 8; // blocks for each head of each cache tensor
constexpr unsigned int kMoveHeads = 8;  // heads at a time

__global__ void inputsKernel(
    int64_t* valid, int64_t* mask, int64_t* positions, int64_t seq, int64_t total)
{
    int64_t const after = validAfter(valid[blockIdx.x], seq);
    for (int64_t column = threadIdx.x; mask != nullptr && column < total; column += blockDim.x)
    {
        mask[blockIdx.x * total + column] = maskAt(after, total, column);
    }
    for (int64_t column = threadIdx.x; positions != nullptr && column < seq; column += blockDim.x)
    {
        positions[blockIdx.x * seq + column] = positionAt(after, seq, column);
    }
    __syncthreads();
    if (threadIdx.x == 0)
    {
        valid[blockIdx.x] = after;
    }
}

// The window of a head is one piece of memory: zeros, then the last rows of what is present.
template <typename Unit>
__device__ void moveHead(Unit const* present, Unit* past, int64_t zeros, int64_t units)
{
    constexpr int kLoads = 4; // at once
    constexpr int64_t kStride = static_cast<int64_t>(kMoveSlices) * kThreads;
#pragma unroll 1 // nvcc would divide to find how often
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; first < units;
         first += kLoads * kStride)
    {
        Unit values[kLoads];
        for (int k = 0; k < kLoads; ++k)
        {
            int64_t const i = first + k * kStride;
            values[k] = i >= zeros && i < units ? present[i - zeros] : Unit{};
        }
        for (int k = 0; k < kLoads; ++k)
        {
            int64_t const i = first + k * kStride;
            if (i < units)
            {
                past[i] = values[k];
            }
        }
    }
}

template <typename Unit>
__device__ void moveRows(CacheMove const& move, int64_t batch, int64_t from, int64_t to)
{
    int64_t const units = move.rowBytes / static_cast<int64_t>(sizeof(Unit));
    int64_t const skipped = alignedSource(0, from, to); // rows; zeros in front if negative
    int64_t const zeros = skipped < 0 ? -skipped * units : 0;
    int64_t const first = skipped < 0 ? 0 : skipped * units;
    for (int64_t head = blockIdx.z; head < batch * move.heads; head += kMoveHeads)
    {
        moveHead(static_cast<Unit const*>(move.present) + head * from * units + first,
            static_cast<Unit*>(move.past) + head * to * units, zeros, to * units);
    }
}

__global__ void __launch_bounds__(kThreads)
    movesKernel(CacheMove const* moves, int64_t batch, int64_t from, int64_t to)
{
    CacheMove const move = moves[blockIdx.y];
    if (move.rowBytes % static_cast<int64_t>(sizeof(uint4)) == 0)
    {
        moveRows<uint4>(move, batch, from, to);
    }
    else
    {
        moveRows<uint32_t>(move, batch, from, to);
    }
}

} // namespace

cudaError_t launchInputs(int64_t* valid, int64_t* mask, int64_t* positions, int64_t batch,
    int64_t seq, int64_t total, cudaStream_t stream)
{
    return launch(inputsKernel, dim3(static_cast<unsigned int>(batch)), kThreads, stream, valid,
        mask, positions, seq, total);
}

cudaError_t launchMoves(CacheMove const* moves, int32_t count, int64_t batch, int64_t from,
    int64_t to, cudaStream_t stream)
{
    dim3 const grid(kMoveSlices, static_cast<unsigned int>(count), kMoveHeads);
    return launch(movesKernel, grid, kThreads, stream, moves, batch, from, to);
}

} // namespace iq
