#include "iq/kernels.h"

#include <algorithm>

#include "iq/dispatch.h"
#include "iq/gated.cuh"
#include "iq/norm.cuh"
#include "iq/rows.cuh"

namespace iq
{
namespace
{

constexpr int kWarp = 32;
constexpr int kMostThreads = 256;
constexpr int kMostWarps = kMostThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffU;
// Blocks walk over the rows, so the grid need not hold them all.
constexpr int64_t kMaxBlocks = 1 << 20;

struct Maximum
{
    __device__ float operator()(float a, float b) const
    {
        return larger(a, b);
    }
};

struct Sum
{
    __device__ float operator()(float a, float b) const
    {
        return a + b;
    }
};

// Every thread of the block, which is whole warps, gets the combination of all threads' values.
template <typename Combine>
__device__ float reduceBlock(float value, Combine combine)
{
    __shared__ float perWarp[kMostWarps];
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
    {
        value = combine(value, __shfl_xor_sync(kAllLanes, value, offset));
    }
    if (threadIdx.x % kWarp == 0)
    {
        perWarp[threadIdx.x / kWarp] = value;
    }
    __syncthreads();
    float total = perWarp[0];
    for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp)
    {
        total = combine(total, perWarp[warp]);
    }
    __syncthreads(); // perWarp is written again by the next call
    return total;
}

// One block per row. All branches depend on the row alone, so the block stays together.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kMostThreads) detectKernel(T const* x, bool const* first,
    bool const* valid, float const* table, float const* energies, float threshold, Shape shape,
    int32_t* index)
{
    for (int64_t row = blockIdx.x; row < shape.rows; row += gridDim.x)
    {
        T const* const values = x + row * shape.hidden;
        float const peak = reduceBlock(
            partialPeak<kWidth>(values, shape.hidden, threadIdx.x, blockDim.x), Maximum{});
        int32_t matched = 0;
        if (isSink(peak, threshold, first[row], valid[row]))
        {
            float best = 0.0F;
            for (int64_t k = 0; k < shape.templates; ++k)
            {
                float const* const entry = table + k * shape.hidden;
                float const dot = reduceBlock(
                    partialDot<kWidth>(values, entry, shape.hidden, threadIdx.x, blockDim.x),
                    Sum{});
                float const distance = templateDistance(energies[k], dot);
                if (k == 0 || distance < best)
                {
                    best = distance;
                    matched = static_cast<int32_t>(k) + 1;
                }
            }
        }
        if (threadIdx.x == 0)
        {
            index[row] = matched;
        }
    }
}

template <Change kChange, typename T, int kWidth>
__global__ void __launch_bounds__(kMostThreads)
    changeKernel(T const* x, int32_t const* index, float const* table, Shape shape, T* y)
{
    for (int64_t row = blockIdx.x; row < shape.rows; row += gridDim.x)
    {
        int64_t const entry = templateRow(index[row], shape.templates);
        int64_t const at = row * shape.hidden;
        changeRow<kChange, kWidth>(x + at, entry < 0 ? nullptr : table + entry * shape.hidden,
            y + at, shape.hidden, threadIdx.x, blockDim.x);
    }
}

template <typename T, int kWidth, int kChunks>
__global__ void __launch_bounds__(kMostThreads) addNormKernel(AddNorm op)
{
    int64_t const hidden = op.shape.hidden;
    for (int64_t row = blockIdx.x; row < op.shape.rows; row += gridDim.x)
    {
        NormRow<T> const what = normRow<T>(op, row);
        RowSlice<T, kWidth, kChunks> const slice(what, threadIdx.x, blockDim.x);
        float middle = 0.0F;
        if (what.bias != nullptr)
        {
            middle = reduceBlock(slice.partialSum(), Sum{}) / static_cast<float>(hidden);
        }
        float const power = reduceBlock(slice.partialPower(middle), Sum{});
        slice.write(middle, inverseSize(power, hidden, op.epsilon));
    }
}

template <typename T, int kWidth, int kPer>
__global__ void __launch_bounds__(kMostThreads) siluMulKernel(SiluMul op)
{
    int64_t const workers = (op.features + kPer - 1) / kPer;
    // Whole warps go round, since they exchange values.
    int64_t const rounded = (workers + kWarp - 1) / kWarp * kWarp;
    for (int64_t row = blockIdx.x; row < op.rows; row += gridDim.x)
    {
        GatedRow<T> const what = gatedRow<T>(op, row);
        bool const sink = op.index != nullptr && op.index[row] > 0;
        for (int64_t worker = threadIdx.x; worker < rounded; worker += blockDim.x)
        {
            int64_t const at = worker * kPer;
            Turned<kPer> values{};
            if (!sink)
            {
                loadProducts<kWidth>(what, at, values);
            }
            takeSide(what, at, values);
            turnWithin(values, op.block);
            for (int step = kPer; step < op.block; step *= 2)
            {
                int const apart = step / kPer;
                IQ_UNROLL
                for (float& value : values.at)
                {
                    float const other = __shfl_xor_sync(kAllLanes, value, apart);
                    value = turnBetween(value, other, (threadIdx.x & apart) != 0);
                }
            }
            storeCodes<kWidth>(what, at, values);
        }
    }
}

unsigned blocks(int64_t rows)
{
    return static_cast<unsigned>(std::min(rows, kMaxBlocks));
}

// Whole warps, no more than there is work for.
unsigned threads(int64_t workers)
{
    int64_t const warps = (workers + kWarp - 1) / kWarp;
    return static_cast<unsigned>(std::min<int64_t>(warps, kMostWarps) * kWarp);
}

template <Change kChange>
cudaError_t launchChange(Element element, void const* x, int32_t const* index, float const* table,
    Shape const& shape, void* y, cudaStream_t stream)
{
    if (isEmpty(shape.rows, shape.hidden))
    {
        return cudaSuccess;
    }
    return dispatch(element, canPack(element, shape.hidden, {x, y, table}),
        [&](auto type, auto width) {
            using T = decltype(type);
            constexpr int kWidth = decltype(width)::value;
            changeKernel<kChange, T, kWidth>
                <<<blocks(shape.rows), threads(shape.hidden / kWidth), 0, stream>>>(
                    static_cast<T const*>(x), index, table, shape, static_cast<T*>(y));
            return cudaGetLastError();
        });
}

template <typename T, int kWidth, int kChunks>
cudaError_t startAddNorm(AddNorm const& op, unsigned threads, cudaStream_t stream)
{
    addNormKernel<T, kWidth, kChunks><<<blocks(op.shape.rows), threads, 0, stream>>>(op);
    return cudaGetLastError();
}

} // namespace

cudaError_t launchDetect(Element element, void const* x, bool const* first, bool const* valid,
    float const* table, float const* energies, float threshold, Shape const& shape, int32_t* index,
    cudaStream_t stream)
{
    if (isEmpty(shape.rows, shape.hidden))
    {
        return cudaSuccess;
    }
    return dispatch(
        element, canPack(element, shape.hidden, {x, table}), [&](auto type, auto width) {
            using T = decltype(type);
            constexpr int kWidth = decltype(width)::value;
            detectKernel<T, kWidth>
                <<<blocks(shape.rows), threads(shape.hidden / kWidth), 0, stream>>>(
                    static_cast<T const*>(x), first, valid, table, energies, threshold, shape,
                    index);
            return cudaGetLastError();
        });
}

cudaError_t launchClampInsert(Element element, void const* x, int32_t const* index,
    float const* table, Shape const& shape, void* y, cudaStream_t stream)
{
    return launchChange<Change::kInsert>(element, x, index, table, shape, y, stream);
}

cudaError_t launchRestore(Element element, void const* x, int32_t const* index, float const* table,
    Shape const& shape, void* y, cudaStream_t stream)
{
    return launchChange<Change::kRestore>(element, x, index, table, shape, y, stream);
}

cudaError_t launchAddNorm(Element element, AddNorm const& op, cudaStream_t stream)
{
    if (isEmpty(op.shape.rows, op.shape.hidden))
    {
        return cudaSuccess;
    }
    return dispatch(element, canPack(element, op), [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int kWidth = decltype(width)::value;
        int64_t const packs = op.shape.hidden / kWidth;
        unsigned const count = threads(packs);
        int64_t const chunks = (packs + count - 1) / count;
        // Only what comes in 16 bytes is worth its registers.
        if constexpr (kWidth > 1)
        {
            if (chunks <= 1)
            {
                return startAddNorm<T, kWidth, 1>(op, count, stream);
            }
            if (chunks <= 2)
            {
                return startAddNorm<T, kWidth, 2>(op, count, stream);
            }
            if (chunks <= 4)
            {
                return startAddNorm<T, kWidth, 4>(op, count, stream);
            }
        }
        return startAddNorm<T, kWidth, 0>(op, count, stream);
    });
}

cudaError_t launchSiluMul(Element element, SiluMul const& op, cudaStream_t stream)
{
    if (isEmpty(op.rows, op.features))
    {
        return cudaSuccess;
    }
    return dispatch(element, canPack(element, op), [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int kWidth = decltype(width)::value;
        int const per = elementsPerWorker(op);
        unsigned const count = threads((op.features + per - 1) / per);
        if (per == kManyPer)
        {
            siluMulKernel<T, kWidth, kManyPer><<<blocks(op.rows), count, 0, stream>>>(op);
        }
        else
        {
            siluMulKernel<T, kWidth, kFewPer><<<blocks(op.rows), count, 0, stream>>>(op);
        }
        return cudaGetLastError();
    });
}

} // namespace iq
