// The arithmetic of the sink ops on one row, for the kernels and for the tests on a CPU.
//
// The meaning of the ops is the ONNX functions in iq_export/sinks/ops.py; this follows them step by
// step. A row is read in packs of `kWidth` elements, 16 bytes where size and alignment allow it and
// single elements elsewhere; `lane` of `lanes` workers takes the packs lane, lane + lanes, ...
#pragma once

#include <cmath>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define IQ_HOST_DEVICE __host__ __device__ inline

// The host's compiler would warn of the pragma.
#ifdef __CUDA_ARCH__
#define IQ_UNROLL _Pragma("unroll")
#else
#define IQ_UNROLL
#endif

namespace iq
{

// Bounds of SinkDetect's Clip: an overflowed half value must still match a template.
constexpr float kLowest = -65504.0F;
constexpr float kHighest = 65504.0F;

IQ_HOST_DEVICE float toFloat(float value)
{
    return value;
}

IQ_HOST_DEVICE float toFloat(__half value)
{
    return __half2float(value);
}

IQ_HOST_DEVICE float toFloat(__nv_bfloat16 value)
{
    return __bfloat162float(value);
}

// Round to nearest, ties to even, as ONNX Cast does.
template <typename T>
IQ_HOST_DEVICE T fromFloat(float value);

template <>
IQ_HOST_DEVICE float fromFloat<float>(float value)
{
    return value;
}

template <>
IQ_HOST_DEVICE __half fromFloat<__half>(float value)
{
    return __float2half_rn(value);
}

template <>
IQ_HOST_DEVICE __nv_bfloat16 fromFloat<__nv_bfloat16>(float value)
{
    return __float2bfloat16_rn(value);
}

// `kWidth` elements that are read and written at once.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack
{
    T at[kWidth];
};

// Elements of one 16-byte access.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <int kWidth, typename T>
IQ_HOST_DEVICE Pack<T, kWidth> load(T const* from)
{
    return *reinterpret_cast<Pack<T, kWidth> const*>(from);
}

template <int kWidth, typename T>
IQ_HOST_DEVICE void store(T* to, Pack<T, kWidth> const& pack)
{
    *reinterpret_cast<Pack<T, kWidth>*>(to) = pack;
}

// `kWidth` entries of a template, which are float whatever the rows are: more than one access.
template <int kWidth>
IQ_HOST_DEVICE Pack<float, kWidth> loadEntries(float const* from)
{
    constexpr int kStep = kWidth < kVector<float> ? kWidth : kVector<float>;
    Pack<float, kWidth> entries;
    IQ_UNROLL
    for (int part = 0; part < kWidth; part += kStep)
    {
        auto const four = load<kStep>(from + part);
        IQ_UNROLL
        for (int j = 0; j < kStep; ++j)
        {
            entries.at[part + j] = four.at[j];
        }
    }
    return entries;
}

// Clip that keeps a NaN; fminf and fmaxf would turn it into a bound, and so into a spike.
IQ_HOST_DEVICE float bounded(float value)
{
    return value < kLowest ? kLowest : (value > kHighest ? kHighest : value);
}

IQ_HOST_DEVICE float magnitude(float value)
{
    return value < 0.0F ? -value : value;
}

IQ_HOST_DEVICE float larger(float a, float b)
{
    return b > a ? b : a;
}

// A worker's share of max |row|; a NaN never wins.
template <int kWidth, typename T>
IQ_HOST_DEVICE float partialPeak(T const* row, int64_t hidden, int64_t lane, int64_t lanes)
{
    float peak = 0.0F;
    for (int64_t i = lane * kWidth; i < hidden; i += lanes * kWidth)
    {
        auto const values = load<kWidth>(row + i);
        for (T const value : values.at)
        {
            peak = larger(peak, magnitude(bounded(toFloat(value))));
        }
    }
    return peak;
}

// A worker's share of the product of a row and a template, both in float.
template <int kWidth, typename T>
IQ_HOST_DEVICE float partialDot(
    T const* row, float const* table, int64_t hidden, int64_t lane, int64_t lanes)
{
    float sum = 0.0F;
    for (int64_t i = lane * kWidth; i < hidden; i += lanes * kWidth)
    {
        auto const values = load<kWidth>(row + i);
        auto const entries = loadEntries<kWidth>(table + i);
        IQ_UNROLL
        for (int j = 0; j < kWidth; ++j)
        {
            sum += bounded(toFloat(values.at[j])) * entries.at[j];
        }
    }
    return sum;
}

IQ_HOST_DEVICE bool isSink(float peak, float threshold, bool first, bool valid)
{
    return (peak > threshold || first) && valid;
}

// |x - T|^2 / 2 without the |x|^2 that all templates share; `energy` is |T|^2 / 2.
IQ_HOST_DEVICE float templateDistance(float energy, float dot)
{
    return energy - dot;
}

// The row of the template table that `index` means; -1 for a semantic token. An index that is not
// of this table (it cannot come from SinkDetect with as many templates) leaves its row alone.
IQ_HOST_DEVICE int64_t templateRow(int32_t index, int64_t templates)
{
    return index > 0 && index <= templates ? static_cast<int64_t>(index) - 1 : -1;
}

// How SinkClampInsert and SinkRestore change an element of a sink row.
enum class Change
{
    kInsert,
    kRestore
};

// T, or x + T with both of the row's type, rounded once, as an ONNX Add of that type.
template <Change kChange, typename T>
IQ_HOST_DEVICE T changed(T value, float entry)
{
    T const inserted = fromFloat<T>(entry);
    return kChange == Change::kInsert ? inserted
                                      : fromFloat<T>(toFloat(value) + toFloat(inserted));
}

// A worker's share of a row of SinkClampInsert or SinkRestore; `entry` is null for a semantic row.
template <Change kChange, int kWidth, typename T>
IQ_HOST_DEVICE void changeRow(
    T const* row, float const* entry, T* out, int64_t hidden, int64_t lane, int64_t lanes)
{
    for (int64_t i = lane * kWidth; i < hidden; i += lanes * kWidth)
    {
        auto values = load<kWidth>(row + i);
        if (entry != nullptr)
        {
            auto const entries = loadEntries<kWidth>(entry + i);
            IQ_UNROLL
            for (int j = 0; j < kWidth; ++j)
            {
                values.at[j] = changed<kChange>(values.at[j], entries.at[j]);
            }
        }
        store<kWidth>(out + i, values);
    }
}

// The int8 code of a value: half to even, saturated, 0 for a NaN.
IQ_HOST_DEVICE int8_t quantized(float value, float scale)
{
    float const steps = value / scale;
    if (!(steps == steps)) // NaN
    {
        return 0;
    }
    float const low = steps < -128.0F ? -128.0F : steps;
    return static_cast<int8_t>(rintf(low > 127.0F ? 127.0F : low));
}

} // namespace iq
