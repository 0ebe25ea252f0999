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
constexpr unsigned kAllLanes = 0xffffffffU;
// Blocks walk over the rows, so the grid need not hold them all.
constexpr int64_t kMaxBlocks = 1 << 20;

// Of a block, and blocks that share a multiprocessor, which bound the registers of a thread: loads
// of many rows must wait together. A multiprocessor of 7.5 has 1,024 threads, a newer one 1,536 or
// more.
constexpr int kThreads = 256;
constexpr int kNormBlocks = 4;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kDetectBlocks = 4;
#else
constexpr int kDetectBlocks = 6;
#endif
// A norm keeps a row of up to 4 packs a thread in registers; of a long row in more threads.
constexpr int kMostChunks = 4, kLongThreads = 512;
constexpr int64_t kWideRow = 512; // packs: a block looks for a sink in such a row, else a warp
constexpr int kGatedThreads = 128;
constexpr unsigned kMostParts = 65535; // a grid's second dimension has no more

struct Maximum
{
    __device__ float operator()(float a, float b) const
    {
        return fmaxf(a, b);
    }
};

struct Sum
{
    __device__ float operator()(float a, float b) const
    {
        return a + b;
    }
};

template <typename Combine>
__device__ float reduceWarp(float value, Combine combine)
{
    IQ_UNROLL
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
    {
        value = combine(value, __shfl_xor_sync(kAllLanes, value, offset));
    }
    return value;
}

// Every thread of the block gets the combination of its warps' values, at most `kWarps` of them;
// 0 must be neutral.
template <int kWarps, typename Combine>
__device__ float reduceBlock(float ofWarp, Combine combine)
{
    __shared__ float perWarp[kWarps];
    unsigned const warps = blockDim.x / kWarp;
    if (threadIdx.x % kWarp == 0)
    {
        perWarp[threadIdx.x / kWarp] = ofWarp;
    }
    if (threadIdx.x + warps < kWarps)
    {
        perWarp[threadIdx.x + warps] = 0.0F;
    }
    __syncthreads();
    float all = perWarp[0];
    IQ_UNROLL
    for (int warp = 1; warp < kWarps; ++warp)
    {
        all = combine(all, perWarp[warp]);
    }
    __syncthreads(); // perWarp is written again by the next call
    return all;
}

template <int kWarps>
__device__ float sumOverBlock(float value)
{
    return reduceBlock<kWarps>(reduceWarp(value, Sum{}), Sum{});
}

// A row of a sink op is read by a warp, or by a block of kThreads.
template <int kLanes, typename Combine>
__device__ float reduceLanes(float value, Combine combine)
{
    value = reduceWarp(value, combine);
    if constexpr (kLanes > kWarp)
    {
        value = reduceBlock<kLanes / kWarp>(value, combine);
    }
    return value;
}

// The template that a sink is nearest to, plus one.
template <int kWidth, int kLanes, typename T>
__device__ int32_t nearest(
    T const* row, float const* table, int32_t templates, int32_t hidden, int32_t lane)
{
    float best = 0.0F;
    int32_t matched = 0;
    for (int32_t k = 1; k <= templates; ++k, table += hidden)
    {
        float const distance = reduceLanes<kLanes>(
            partialDistance<kWidth>(row, table, hidden, lane, kLanes), Sum{});
        if (k == 1 || distance < best)
        {
            best = distance;
            matched = k;
        }
    }
    return matched;
}

// All branches depend on the row alone, so its threads stay together.
template <typename T, int kWidth, int kLanes>
__global__ void __launch_bounds__(kThreads, kDetectBlocks)
    detectKernel(T const* x, bool const* first, bool const* valid, float const* table,
        float threshold, Shape shape, int32_t* index)
{
    constexpr int kRows = kThreads / kLanes;
    constexpr int kAhead = kLanes == kWarp ? 4 : 2; // 1,024 or 4,096 halves are read at once
    int const lane = static_cast<int>(threadIdx.x) % kLanes;
    auto const hidden = static_cast<int32_t>(shape.hidden);
    int64_t const step = static_cast<int64_t>(gridDim.x) * kRows;
    int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kLanes;
    for (; row < shape.rows; row += step)
    {
        bool const isFirst = first[row], isValid = valid[row];
        T const* const values = x + row * hidden;
        float const peak = reduceLanes<kLanes>(
            partialPeak<kWidth, kAhead>(values, hidden, lane, kLanes), Maximum{});
        int32_t const matched = isSink(peak, threshold, isFirst, isValid)
            ? nearest<kWidth, kLanes>(
                values, table, static_cast<int32_t>(shape.templates), hidden, lane)
            : 0;
        if (lane == 0)
        {
            index[row] = matched;
        }
    }
}

template <Change kChange, typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    changeKernel(T const* x, int32_t const* index, float const* table, Shape shape, T* y)
{
    for (int64_t row = blockIdx.x; row < shape.rows; row += gridDim.x)
    {
        int64_t const entry = templateRow(index[row], shape.templates);
        int64_t const at = row * shape.hidden;
        changeRow<kChange, kWidth>(x + at, entry < 0 ? nullptr : table + entry * shape.hidden,
            y + at, static_cast<int32_t>(shape.hidden), threadIdx.x, blockDim.x);
    }
}

template <int kChunks>
constexpr int kNormThreads = kChunks == kMostChunks ? kLongThreads : kThreads;

template <typename T, int kWidth, int kChunks>
__global__ void __launch_bounds__(
    kNormThreads<kChunks>, kChunks == kMostChunks ? 1 : kNormBlocks) addNormKernel(AddNorm op)
{
    constexpr int kNormWarps = kNormThreads<kChunks> / kWarp;
    int64_t const hidden = op.shape.hidden;
    for (int64_t row = blockIdx.x; row < op.shape.rows; row += gridDim.x)
    {
        // Read here and used last, so that nothing waits for it.
        int32_t const index = op.index == nullptr ? 0 : op.index[row];
        RowSlice<T, kWidth, kChunks> const slice(normRow<T>(op, row), threadIdx.x, blockDim.x);
        float middle = 0.0F;
        if (op.bias != nullptr)
        {
            middle
                = sumOverBlock<kNormWarps>(slice.partialSum()) / static_cast<float>(hidden);
        }
        float const power = sumOverBlock<kNormWarps>(slice.partialPower(middle));
        slice.write(
            middle, inverseSize(power, hidden, op.epsilon), insertedCodes(op, index));
    }
}

// The rounds of the transform between the threads of a warp.
template <int kPer>
__device__ void turnAcross(Pack<float, kPer>& values, int32_t block)
{
    for (int apart = 1; apart * kPer < block; apart *= 2)
    {
        float const sign = (threadIdx.x & apart) != 0 ? -1.0F : 1.0F;
        IQ_UNROLL
        for (float& value : values.at)
        {
            value = turnBetween(value, __shfl_xor_sync(kAllLanes, value, apart), sign);
        }
    }
}

// A row goes to gridDim.y blocks.
template <typename T, int kWidth, int kPer>
__global__ void __launch_bounds__(kGatedThreads) siluMulKernel(SiluMul op)
{
    int const workers = static_cast<int>((op.features + kPer - 1) / kPer);
    // Whole warps go round, since they exchange values.
    int const whole = (workers + kWarp - 1) / kWarp * kWarp;
    int const stride = static_cast<int>(gridDim.y * blockDim.x);
    for (int64_t row = blockIdx.x; row < op.rows; row += gridDim.x)
    {
        GatedRow<T> const what = gatedRow<T>(op, row);
        bool const sink = op.index != nullptr && op.index[row] > 0;
        for (int worker = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
             worker < whole; worker += stride)
        {
            int const at = worker * kPer;
            // A sink's are read as well: the loads need not wait for its index.
            GatedPacks<T, kWidth, kPer> packs;
            loadGated(what, at, packs);
            auto values = sink ? Pack<float, kPer>{} : products(packs, what.unit);
            takeSide(what, at, values);
            turnWithin(values, op.block);
            turnAcross(values, op.block);
            storeCodes<kWidth>(what, at, values);
        }
    }
}

unsigned blocks(int64_t rows)
{
    return static_cast<unsigned>(std::min(rows, kMaxBlocks));
}

// Whole warps, no more than there is work for.
unsigned threads(int64_t workers, int most = kThreads)
{
    int64_t const warps = (workers + kWarp - 1) / kWarp;
    return static_cast<unsigned>(std::min<int64_t>(warps * kWarp, most));
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

template <typename T, int kWidth, int kPer>
cudaError_t startSiluMul(SiluMul const& op, cudaStream_t stream)
{
    int64_t const workers = (op.features + kPer - 1) / kPer;
    unsigned const count = threads(workers, kGatedThreads);
    auto const parts = static_cast<unsigned>((workers + count - 1) / count);
    dim3 const grid(blocks(op.rows), std::min(parts, kMostParts));
    siluMulKernel<T, kWidth, kPer><<<grid, count, 0, stream>>>(op);
    return cudaGetLastError();
}

template <typename T, int kWidth, int kLanes>
cudaError_t startDetect(void const* x, bool const* first, bool const* valid, float const* table,
    float threshold, Shape const& shape, int32_t* index, cudaStream_t stream)
{
    constexpr int64_t kRows = kThreads / kLanes;
    detectKernel<T, kWidth, kLanes>
        <<<blocks((shape.rows + kRows - 1) / kRows), kThreads, 0, stream>>>(
            static_cast<T const*>(x), first, valid, table, threshold, shape, index);
    return cudaGetLastError();
}

} // namespace

cudaError_t launchDetect(Element element, void const* x, bool const* first, bool const* valid,
    float const* table, float threshold, Shape const& shape, int32_t* index, cudaStream_t stream)
{
    if (isEmpty(shape.rows, shape.hidden))
    {
        return cudaSuccess;
    }
    return dispatch(
        element, canPack(element, shape.hidden, {x, table}), [&](auto type, auto width) {
            using T = decltype(type);
            constexpr int kWidth = decltype(width)::value;
            return shape.hidden < kWideRow * kWidth
                ? startDetect<T, kWidth, kWarp>(
                    x, first, valid, table, threshold, shape, index, stream)
                : startDetect<T, kWidth, kThreads>(
                    x, first, valid, table, threshold, shape, index, stream);
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
        // Only what comes in 16 bytes is worth its registers.
        if constexpr (kWidth > 1)
        {
            if (packs <= kThreads)
            {
                return startAddNorm<T, kWidth, 1>(op, threads(packs), stream);
            }
            if (packs <= 2 * kThreads)
            {
                return startAddNorm<T, kWidth, 2>(op, kThreads, stream);
            }
            if (packs <= kMostChunks * kLongThreads)
            {
                bool const isLong = packs > kMostChunks * kThreads;
                return startAddNorm<T, kWidth, kMostChunks>(
                    op, isLong ? kLongThreads : kThreads, stream);
            }
        }
        return startAddNorm<T, kWidth, 0>(op, threads(packs), stream);
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
        return elementsPerWorker(op) == kManyPer ? startSiluMul<T, kWidth, kManyPer>(op, stream)
                                                 : startSiluMul<T, kWidth, kFewPer>(op, stream);
    });
}

} // namespace iq
