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

// The CUDA programming guide, "Technical Specifications per Compute Capability"; at least so many.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 800
constexpr int kThreadsOfMultiprocessor = 1024;
#elif __CUDA_ARCH__ == 800 || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ <= 1030)
constexpr int kThreadsOfMultiprocessor = 2048;
#else
constexpr int kThreadsOfMultiprocessor = 1536;
#endif
// Of a block, and blocks that share a multiprocessor, which bound the registers of a thread: loads
// of many rows must wait together.
constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kNormBlocks = 4, kDetectBlocks = kThreadsOfMultiprocessor / kThreads;
// A norm keeps a row of up to 4 packs a thread in registers; of a long row in more threads.
constexpr int kMostChunks = 4, kLongThreads = 512;
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

// Every thread of the block, which is at most `kWarps` whole warps, gets the sum of all threads'
// values.
template <int kWarps>
__device__ float sumOverBlock(float value)
{
    __shared__ float perWarp[kWarps];
    unsigned const warps = blockDim.x / kWarp;
    value = reduceWarp(value, Sum{});
    if (threadIdx.x % kWarp == 0)
    {
        perWarp[threadIdx.x / kWarp] = value;
    }
    if (threadIdx.x + warps < kWarps)
    {
        perWarp[threadIdx.x + warps] = 0.0F;
    }
    __syncthreads();
    float total = 0.0F;
    IQ_UNROLL
    for (float const part : perWarp)
    {
        total += part;
    }
    __syncthreads(); // perWarp is written again by the next call
    return total;
}

// The template that a sink is nearest to, plus one.
template <int kWidth, typename T>
__device__ int32_t nearest(T const* row, float const* table, Shape const& shape)
{
    auto const hidden = static_cast<int32_t>(shape.hidden);
    float best = 0.0F;
    int32_t matched = 0;
    for (int64_t k = 0; k < shape.templates; ++k)
    {
        float const distance = sumOverBlock<kWarps>(partialDistance<kWidth>(
            row, table + k * hidden, hidden, threadIdx.x, blockDim.x));
        if (k == 0 || distance < best)
        {
            best = distance;
            matched = static_cast<int32_t>(k) + 1;
        }
    }
    return matched;
}

// A block takes `rows` rows, each read by `warps` of its warps, both powers of two; a sink, which is
// rare, is matched by all.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kDetectBlocks)
    detectKernel(T const* x, bool const* first, bool const* valid, float const* table,
        float threshold, Shape shape, int32_t* index, int rows, int warps)
{
    __shared__ float peaks[kWarps];
    int const warp = static_cast<int>(threadIdx.x) / kWarp;
    int const lane = static_cast<int>(threadIdx.x) % kWarp;
    auto const hidden = static_cast<int32_t>(shape.hidden);
    int64_t const step = static_cast<int64_t>(gridDim.x) * rows;
    for (int64_t from = static_cast<int64_t>(blockIdx.x) * rows; from < shape.rows; from += step)
    {
        // In every warp a lane decides on a row; what it needs is read before anything waits.
        bool const decides = lane < rows && from + lane < shape.rows;
        bool const isFirst = decides && first[from + lane];
        bool const isValid = decides && valid[from + lane];
        int64_t const row = from + warp * rows / kWarps;
        float const peak = row < shape.rows
            ? partialPeak<kWidth>(x + row * hidden, hidden,
                static_cast<int>(threadIdx.x) & (warps * kWarp - 1), warps * kWarp)
            : 0.0F;
        float const largest = reduceWarp(peak, Maximum{});
        if (lane == 0)
        {
            peaks[warp] = largest;
        }
        __syncthreads();
        float peakOfRow = 0.0F;
        IQ_UNROLL
        for (int other = 0; other < kWarps; ++other)
        {
            bool const own = other >= lane * warps && other < (lane + 1) * warps;
            peakOfRow = own ? fmaxf(peakOfRow, peaks[other]) : peakOfRow;
        }
        bool const sink = isSink(peakOfRow, threshold, isFirst, isValid);
        if (warp == 0 && decides && !sink)
        {
            index[from + lane] = 0;
        }
        for (unsigned sinks = __ballot_sync(kAllLanes, sink); sinks != 0; sinks &= sinks - 1)
        {
            int64_t const at = from + __ffs(static_cast<int>(sinks)) - 1;
            int32_t const matched = nearest<kWidth>(x + at * hidden, table, shape);
            if (threadIdx.x == 0)
            {
                index[at] = matched;
            }
        }
        if (from + step < shape.rows)
        {
            __syncthreads(); // peaks is written again
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
            GatedPacks<T, kWidth, kPer> packs{};
            if (!sink)
            {
                loadGated(what, at, packs);
            }
            auto values = products(packs, what.unit);
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
            // A power of two: each thread reads about kAhead packs.
            int warps = 1;
            while (warps < kWarps && shape.hidden > kAhead * kWarp * kWidth * warps)
            {
                warps *= 2;
            }
            int const rows = kWarps / warps;
            detectKernel<T, kWidth>
                <<<blocks((shape.rows + rows - 1) / rows), kThreads, 0, stream>>>(
                    static_cast<T const*>(x), first, valid, table, threshold, shape, index, rows,
                    warps);
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
