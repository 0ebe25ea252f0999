// The arithmetic of the three sink ops on one row, for the kernels and for the tests on a CPU.
//
// The meaning of the ops is the ONNX functions in iq_export/sinks/ops.py; this follows them step by
// step. `lane` of `lanes` workers takes the elements lane, lane + lanes, ... of a row.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define IQ_HOST_DEVICE __host__ __device__ inline

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
template <typename T>
IQ_HOST_DEVICE float partialPeak(T const* row, int64_t hidden, int64_t lane, int64_t lanes)
{
    float peak = 0.0F;
    for (int64_t i = lane; i < hidden; i += lanes)
    {
        peak = larger(peak, magnitude(bounded(toFloat(row[i]))));
    }
    return peak;
}

// A worker's share of the product of a row and a template, both in float.
template <typename T>
IQ_HOST_DEVICE float partialDot(
    T const* row, float const* table, int64_t hidden, int64_t lane, int64_t lanes)
{
    float sum = 0.0F;
    for (int64_t i = lane; i < hidden; i += lanes)
    {
        sum += bounded(toFloat(row[i])) * table[i];
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

// x + T, both of type T, rounded once, as an ONNX Add of that type.
template <typename T>
IQ_HOST_DEVICE T restored(T value, float entry)
{
    return fromFloat<T>(toFloat(value) + toFloat(fromFloat<T>(entry)));
}

} // namespace iq
