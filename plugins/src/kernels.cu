#include "iq/kernels.h"

#include <algorithm>

#include "iq/rows.cuh"

namespace iq
{
namespace
{

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
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

// Every thread of the block gets the combination of all threads' values.
template <typename Combine>
__device__ float reduceBlock(float value, Combine combine)
{
    __shared__ float perWarp[kWarps];
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
    for (int warp = 1; warp < kWarps; ++warp)
    {
        total = combine(total, perWarp[warp]);
    }
    __syncthreads(); // perWarp is written again by the next call
    return total;
}

// One block per row. All branches depend on the row alone, so the block stays together.
template <typename T>
__global__ void __launch_bounds__(kThreads) detectKernel(T const* x, bool const* first,
    bool const* valid, float const* table, float const* energies, float threshold, Shape shape,
    int32_t* index)
{
    for (int64_t row = blockIdx.x; row < shape.rows; row += gridDim.x)
    {
        T const* const values = x + row * shape.hidden;
        float const peak
            = reduceBlock(partialPeak(values, shape.hidden, threadIdx.x, kThreads), Maximum{});
        int32_t matched = 0;
        if (isSink(peak, threshold, first[row], valid[row]))
        {
            float best = 0.0F;
            for (int64_t k = 0; k < shape.templates; ++k)
            {
                float const* const entry = table + k * shape.hidden;
                float const dot = reduceBlock(
                    partialDot(values, entry, shape.hidden, threadIdx.x, kThreads), Sum{});
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

struct Insert
{
    template <typename T>
    __device__ T operator()(T, float entry) const
    {
        return fromFloat<T>(entry);
    }
};

struct Restore
{
    template <typename T>
    __device__ T operator()(T value, float entry) const
    {
        return restored(value, entry);
    }
};

template <typename T, typename Change>
__global__ void __launch_bounds__(kThreads) changeKernel(
    T const* x, int32_t const* index, float const* table, Shape shape, T* y, Change change)
{
    for (int64_t row = blockIdx.x; row < shape.rows; row += gridDim.x)
    {
        int64_t const entry = templateRow(index[row], shape.templates);
        int64_t const at = row * shape.hidden;
        for (int64_t i = threadIdx.x; i < shape.hidden; i += kThreads)
        {
            T const value = x[at + i];
            y[at + i] = entry < 0 ? value : change(value, table[entry * shape.hidden + i]);
        }
    }
}

unsigned blocks(Shape const& shape)
{
    return static_cast<unsigned>(std::min(shape.rows, kMaxBlocks));
}

bool isEmpty(Shape const& shape)
{
    return shape.rows == 0 || shape.hidden == 0;
}

template <typename T>
cudaError_t detect(void const* x, bool const* first, bool const* valid, float const* table,
    float const* energies, float threshold, Shape const& shape, int32_t* index, cudaStream_t stream)
{
    detectKernel<T><<<blocks(shape), kThreads, 0, stream>>>(
        static_cast<T const*>(x), first, valid, table, energies, threshold, shape, index);
    return cudaGetLastError();
}

template <typename T, typename Change>
cudaError_t changeRows(void const* x, int32_t const* index, float const* table, Shape const& shape,
    void* y, Change change, cudaStream_t stream)
{
    changeKernel<T><<<blocks(shape), kThreads, 0, stream>>>(
        static_cast<T const*>(x), index, table, shape, static_cast<T*>(y), change);
    return cudaGetLastError();
}

template <typename Change>
cudaError_t changeElements(Element element, void const* x, int32_t const* index, float const* table,
    Shape const& shape, void* y, Change change, cudaStream_t stream)
{
    if (isEmpty(shape))
    {
        return cudaSuccess;
    }
    switch (element)
    {
    case Element::kFloat: return changeRows<float>(x, index, table, shape, y, change, stream);
    case Element::kHalf: return changeRows<__half>(x, index, table, shape, y, change, stream);
    case Element::kBFloat16:
        return changeRows<__nv_bfloat16>(x, index, table, shape, y, change, stream);
    }
    return cudaErrorInvalidValue;
}

} // namespace

cudaError_t launchDetect(Element element, void const* x, bool const* first, bool const* valid,
    float const* table, float const* energies, float threshold, Shape const& shape, int32_t* index,
    cudaStream_t stream)
{
    if (isEmpty(shape))
    {
        return cudaSuccess;
    }
    switch (element)
    {
    case Element::kFloat:
        return detect<float>(x, first, valid, table, energies, threshold, shape, index, stream);
    case Element::kHalf:
        return detect<__half>(x, first, valid, table, energies, threshold, shape, index, stream);
    case Element::kBFloat16:
        return detect<__nv_bfloat16>(
            x, first, valid, table, energies, threshold, shape, index, stream);
    }
    return cudaErrorInvalidValue;
}

cudaError_t launchClampInsert(Element element, void const* x, int32_t const* index,
    float const* table, Shape const& shape, void* y, cudaStream_t stream)
{
    return changeElements(element, x, index, table, shape, y, Insert{}, stream);
}

cudaError_t launchRestore(Element element, void const* x, int32_t const* index, float const* table,
    Shape const& shape, void* y, cudaStream_t stream)
{
    return changeElements(element, x, index, table, shape, y, Restore{}, stream);
}

} // namespace iq
