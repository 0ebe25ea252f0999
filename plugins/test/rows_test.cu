// A C interface to the sink ops' arithmetic for tests/plugins: on the CPU with any number of
// workers per row, and through the kernels on a GPU.
#include <vector>

#include <cuda_runtime.h>

#include "iq/kernels.h"
#include "iq/rows.cuh"

#define IQ_TEST extern "C" __attribute__((visibility("default")))

namespace
{

using iq::Element;
using iq::Shape;

std::vector<float> energiesOf(float const* table, Shape const& shape)
{
    std::vector<float> energies;
    for (int64_t k = 0; k < shape.templates; ++k)
    {
        double square = 0.0;
        for (int64_t i = 0; i < shape.hidden; ++i)
        {
            double const value = table[k * shape.hidden + i];
            square += value * value;
        }
        energies.push_back(static_cast<float>(square / 2.0));
    }
    return energies;
}

template <typename T>
int32_t detectRow(T const* row, float const* table, std::vector<float> const& energies,
    Shape const& shape, float threshold, bool first, bool valid, int64_t lanes)
{
    float peak = 0.0F;
    for (int64_t lane = 0; lane < lanes; ++lane)
    {
        peak = iq::larger(peak, iq::partialPeak(row, shape.hidden, lane, lanes));
    }
    if (!iq::isSink(peak, threshold, first, valid))
    {
        return 0;
    }
    float best = 0.0F;
    int32_t matched = 0;
    for (int64_t k = 0; k < shape.templates; ++k)
    {
        float dot = 0.0F;
        for (int64_t lane = 0; lane < lanes; ++lane)
        {
            dot += iq::partialDot(row, table + k * shape.hidden, shape.hidden, lane, lanes);
        }
        float const distance = iq::templateDistance(energies[static_cast<size_t>(k)], dot);
        if (k == 0 || distance < best)
        {
            best = distance;
            matched = static_cast<int32_t>(k) + 1;
        }
    }
    return matched;
}

template <typename T>
void detectAll(void const* x, bool const* first, bool const* valid, float const* table,
    float threshold, Shape const& shape, int64_t lanes, int32_t* index)
{
    auto const energies = energiesOf(table, shape);
    for (int64_t row = 0; row < shape.rows; ++row)
    {
        T const* const values = static_cast<T const*>(x) + row * shape.hidden;
        index[row] = detectRow(
            values, table, energies, shape, threshold, first[row], valid[row], lanes);
    }
}

template <typename T>
void changeAll(bool restore, void const* x, int32_t const* index, float const* table,
    Shape const& shape, void* y)
{
    for (int64_t row = 0; row < shape.rows; ++row)
    {
        int64_t const entry = iq::templateRow(index[row], shape.templates);
        for (int64_t i = 0; i < shape.hidden; ++i)
        {
            int64_t const at = row * shape.hidden + i;
            T const value = static_cast<T const*>(x)[at];
            T& out = static_cast<T*>(y)[at];
            if (entry < 0)
            {
                out = value;
                continue;
            }
            float const wanted = table[entry * shape.hidden + i];
            out = restore ? iq::restored(value, wanted) : iq::fromFloat<T>(wanted);
        }
    }
}

size_t bytesOf(Element element)
{
    return element == Element::kFloat ? 4 : 2;
}

// Device memory that starts as a copy of host memory.
class DeviceCopy
{
public:
    DeviceCopy(void const* host, size_t bytes)
        : mBytes(bytes)
    {
        mStatus = cudaMalloc(&mDevice, bytes == 0 ? 1 : bytes);
        if (mStatus == cudaSuccess && host != nullptr)
        {
            mStatus = cudaMemcpy(mDevice, host, bytes, cudaMemcpyHostToDevice);
        }
    }
    ~DeviceCopy()
    {
        static_cast<void>(cudaFree(mDevice));
    }
    DeviceCopy(DeviceCopy const&) = delete;
    DeviceCopy& operator=(DeviceCopy const&) = delete;

    template <typename T>
    T* as() const
    {
        return static_cast<T*>(mDevice);
    }
    cudaError_t read(void* host) const
    {
        return mStatus != cudaSuccess ? mStatus
                                      : cudaMemcpy(host, mDevice, mBytes, cudaMemcpyDeviceToHost);
    }

private:
    void* mDevice{nullptr};
    size_t mBytes;
    cudaError_t mStatus;
};

size_t count(int64_t value)
{
    return static_cast<size_t>(value);
}

} // namespace

// Number of usable GPUs; 0 without a driver.
IQ_TEST int iq_gpu_count()
{
    int devices = 0;
    return cudaGetDeviceCount(&devices) == cudaSuccess ? devices : 0;
}

IQ_TEST void iq_detect_cpu(int element, void const* x, bool const* first, bool const* valid,
    float const* table, float threshold, int64_t rows, int64_t hidden, int64_t templates,
    int64_t lanes, int32_t* index)
{
    Shape const shape{rows, hidden, templates};
    switch (static_cast<Element>(element))
    {
    case Element::kFloat:
        return detectAll<float>(x, first, valid, table, threshold, shape, lanes, index);
    case Element::kHalf:
        return detectAll<__half>(x, first, valid, table, threshold, shape, lanes, index);
    case Element::kBFloat16:
        return detectAll<__nv_bfloat16>(x, first, valid, table, threshold, shape, lanes, index);
    }
}

IQ_TEST void iq_change_cpu(int element, bool restore, void const* x, int32_t const* index,
    float const* table, int64_t rows, int64_t hidden, int64_t templates, void* y)
{
    Shape const shape{rows, hidden, templates};
    switch (static_cast<Element>(element))
    {
    case Element::kFloat: return changeAll<float>(restore, x, index, table, shape, y);
    case Element::kHalf: return changeAll<__half>(restore, x, index, table, shape, y);
    case Element::kBFloat16: return changeAll<__nv_bfloat16>(restore, x, index, table, shape, y);
    }
}

// As above through the kernels; the value is a cudaError_t.
IQ_TEST int iq_detect_gpu(int element, void const* x, bool const* first, bool const* valid,
    float const* table, float threshold, int64_t rows, int64_t hidden, int64_t templates,
    int32_t* index)
{
    Shape const shape{rows, hidden, templates};
    auto const energies = energiesOf(table, shape);
    auto const kind = static_cast<Element>(element);
    DeviceCopy const deviceX(x, count(rows * hidden) * bytesOf(kind));
    DeviceCopy const deviceFirst(first, count(rows));
    DeviceCopy const deviceValid(valid, count(rows));
    DeviceCopy const deviceTable(table, count(templates * hidden) * sizeof(float));
    DeviceCopy const deviceEnergies(energies.data(), count(templates) * sizeof(float));
    DeviceCopy const deviceIndex(nullptr, count(rows) * sizeof(int32_t));
    cudaError_t const launched = iq::launchDetect(kind, deviceX.as<void>(), deviceFirst.as<bool>(),
        deviceValid.as<bool>(), deviceTable.as<float>(), deviceEnergies.as<float>(), threshold,
        shape, deviceIndex.as<int32_t>(), nullptr);
    return launched != cudaSuccess ? launched : deviceIndex.read(index);
}

IQ_TEST int iq_change_gpu(int element, bool restore, void const* x, int32_t const* index,
    float const* table, int64_t rows, int64_t hidden, int64_t templates, void* y)
{
    Shape const shape{rows, hidden, templates};
    auto const kind = static_cast<Element>(element);
    size_t const bytes = count(rows * hidden) * bytesOf(kind);
    DeviceCopy const deviceX(x, bytes);
    DeviceCopy const deviceIndex(index, count(rows) * sizeof(int32_t));
    DeviceCopy const deviceTable(table, count(templates * hidden) * sizeof(float));
    DeviceCopy const deviceY(nullptr, bytes);
    auto* const launch = restore ? iq::launchRestore : iq::launchClampInsert;
    cudaError_t const launched = launch(kind, deviceX.as<void>(), deviceIndex.as<int32_t>(),
        deviceTable.as<float>(), shape, deviceY.as<void>(), nullptr);
    return launched != cudaSuccess ? launched : deviceY.read(y);
}
