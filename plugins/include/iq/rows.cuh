// The arithmetic of the sink ops on one row, for the kernels and for the tests on a CPU.
//
// The meaning of the ops is the ONNX functions in iq_export/sinks/ops.py; this follows them step by
// step. A row is read in packs of `kWidth` elements, 16 bytes where size and alignment allow it and
// single elements elsewhere; `lane` of `lanes` workers takes the packs lane, lane + lanes, ...
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define IQ_HOST_DEVICE __host__ __device__ inline

// The host's compiler would warn of the pragmas.
#ifdef __CUDA_ARCH__
#define IQ_UNROLL _Pragma("unroll")
#define IQ_KEEP_LOOP _Pragma("unroll 1")
#else
#define IQ_UNROLL
#define IQ_KEEP_LOOP
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

// What is read or written by one instruction: of a Pack the compiler makes accesses to its elements
// where it thinks of them one by one.
template <size_t kBytes>
using Access = std::conditional_t<kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2,
        std::conditional_t<kBytes == 4, uint32_t,
            std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>>;

#ifdef __CUDA_ARCH__
__device__ inline void storeWhole(void* to, uint4 const& whole)
{
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
        "r"(whole.x), "r"(whole.y), "r"(whole.z), "r"(whole.w)
        : "memory");
}

__device__ inline void storeWhole(void* to, uint2 const& whole)
{
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)),
        "r"(whole.x), "r"(whole.y)
        : "memory");
}
#endif

template <int kWidth, typename T>
IQ_HOST_DEVICE Pack<T, kWidth> load(T const* from)
{
    using Whole = Access<sizeof(Pack<T, kWidth>)>;
    static_assert(sizeof(Whole) == sizeof(Pack<T, kWidth>));
    Whole const whole = *reinterpret_cast<Whole const*>(from);
    Pack<T, kWidth> pack;
    memcpy(&pack, &whole, sizeof(pack));
    return pack;
}

template <int kWidth, typename T>
IQ_HOST_DEVICE void store(T* to, Pack<T, kWidth> const& pack)
{
    using Whole = Access<sizeof(Pack<T, kWidth>)>;
    static_assert(sizeof(Whole) == sizeof(Pack<T, kWidth>));
    Whole whole;
    memcpy(&whole, &pack, sizeof(pack));
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(Whole) > 4)
    {
        storeWhole(to, whole); // an assignment is taken apart again
    }
    else
#endif
    {
        *reinterpret_cast<Whole*>(to) = whole;
    }
}

// A pack's elements come and go in pairs on the device: that is one instruction for each, or for
// both, where single halves would be cut out of their registers first.
template <typename T, int kWidth>
constexpr bool kPaired = sizeof(T) == 2 && kWidth % 2 == 0;

template <typename T>
using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

#ifdef __CUDA_ARCH__
__device__ inline float2 toFloats(__half2 pair)
{
    return __half22float2(pair);
}

__device__ inline float2 toFloats(__nv_bfloat162 pair)
{
    return __bfloat1622float2(pair);
}

__device__ inline void fromFloats(float low, float high, __half2& pair)
{
    pair = __floats2half2_rn(low, high);
}

__device__ inline void fromFloats(float low, float high, __nv_bfloat162& pair)
{
    pair = __floats2bfloat162_rn(low, high);
}
#endif

template <typename T, int kWidth>
IQ_HOST_DEVICE Pack<float, kWidth> toFloats(Pack<T, kWidth> const& pack)
{
    Pack<float, kWidth> values;
#ifdef __CUDA_ARCH__
    if constexpr (kPaired<T, kWidth>)
    {
        auto const* const pairs = reinterpret_cast<Pair<T> const*>(pack.at);
        IQ_UNROLL
        for (int j = 0; j < kWidth; j += 2)
        {
            float2 const both = toFloats(pairs[j / 2]);
            values.at[j] = both.x;
            values.at[j + 1] = both.y;
        }
    }
    else
#endif
    {
        IQ_UNROLL
        for (int j = 0; j < kWidth; ++j)
        {
            values.at[j] = toFloat(pack.at[j]);
        }
    }
    return values;
}

template <typename T, int kWidth>
IQ_HOST_DEVICE Pack<T, kWidth> fromFloats(Pack<float, kWidth> const& values)
{
    Pack<T, kWidth> pack;
#ifdef __CUDA_ARCH__
    if constexpr (kPaired<T, kWidth>)
    {
        auto* const pairs = reinterpret_cast<Pair<T>*>(pack.at);
        IQ_UNROLL
        for (int j = 0; j < kWidth; j += 2)
        {
            fromFloats(values.at[j], values.at[j + 1], pairs[j / 2]);
        }
    }
    else
#endif
    {
        IQ_UNROLL
        for (int j = 0; j < kWidth; ++j)
        {
            pack.at[j] = fromFloat<T>(values.at[j]);
        }
    }
    return pack;
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

// Calls visit(position, number of the pack) for each pack of a worker: at most `kChunks`, for an
// array of them to stay in registers, or with 0 as many as there are.
template <int kWidth, int kChunks, typename Visit>
IQ_HOST_DEVICE void eachPack(int32_t hidden, int32_t lane, int32_t lanes, Visit visit)
{
    if constexpr (kChunks > 0)
    {
        IQ_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk)
        {
            int32_t const at = (lane + chunk * lanes) * kWidth;
            if (at < hidden)
            {
                visit(at, chunk);
            }
        }
    }
    else
    {
        for (int32_t at = lane * kWidth; at < hidden; at += lanes * kWidth)
        {
            visit(at, 0);
        }
    }
}

// A worker's share of max |row|; a NaN never wins. `kAhead` packs are read before one is used.
template <int kWidth, int kAhead, typename T>
IQ_HOST_DEVICE float partialPeak(T const* row, int32_t hidden, int32_t lane, int32_t lanes)
{
    float peak = 0.0F;
    for (int32_t from = lane * kWidth; from < hidden; from += kAhead * lanes * kWidth)
    {
        Pack<T, kWidth> ahead[kAhead] = {};
        eachPack<kWidth, kAhead>(hidden - from, 0, lanes,
            [&](int32_t at, int chunk) { ahead[chunk] = load<kWidth>(row + from + at); });
        IQ_UNROLL
        for (auto const& pack : ahead)
        {
            auto const values = toFloats(pack);
            IQ_UNROLL
            for (float const value : values.at)
            {
                peak = fmaxf(peak, fabsf(value));
            }
        }
    }
    return bounded(peak);
}

// A worker's share of |row - template|^2, element by element as in the function body: products and
// norms of spikes would cancel, and another template could win.
template <int kWidth, typename T>
IQ_HOST_DEVICE float partialDistance(
    T const* row, float const* table, int32_t hidden, int32_t lane, int32_t lanes)
{
    float sum = 0.0F;
    IQ_KEEP_LOOP // it is rare, and is to take no registers from what is not
    for (int32_t i = lane * kWidth; i < hidden; i += lanes * kWidth)
    {
        auto const values = toFloats(load<kWidth>(row + i));
        auto const entries = loadEntries<kWidth>(table + i);
        IQ_UNROLL
        for (int j = 0; j < kWidth; ++j)
        {
            float const difference = bounded(values.at[j]) - entries.at[j];
            sum += difference * difference;
        }
    }
    return sum;
}

IQ_HOST_DEVICE bool isSink(float peak, float threshold, bool first, bool valid)
{
    return (peak > threshold || first) && valid;
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

// A worker's share of a row of SinkClampInsert, T, or of SinkRestore, x + T with both in the row's
// type, rounded once, as an ONNX Add of that type. `entry` is null for a semantic row.
template <Change kChange, int kWidth, typename T>
IQ_HOST_DEVICE void changeRow(
    T const* row, float const* entry, T* out, int32_t hidden, int32_t lane, int32_t lanes)
{
    for (int32_t i = lane * kWidth; i < hidden; i += lanes * kWidth)
    {
        if (entry == nullptr)
        {
            store<kWidth>(out + i, load<kWidth>(row + i));
            continue;
        }
        auto made = fromFloats<T>(loadEntries<kWidth>(entry + i));
        if constexpr (kChange == Change::kRestore)
        {
            auto sum = toFloats(load<kWidth>(row + i));
            auto const inserted = toFloats(made);
            IQ_UNROLL
            for (int j = 0; j < kWidth; ++j)
            {
                sum.at[j] += inserted.at[j];
            }
            made = fromFloats<T>(sum);
        }
        store<kWidth>(out + i, made);
    }
}

// The int8 code of a value in steps of the scale: half to even, saturated, 0 for a NaN.
IQ_HOST_DEVICE int8_t rounded(float steps)
{
#ifdef __CUDA_ARCH__
    return static_cast<int8_t>(max(-128, min(127, __float2int_rn(steps)))); // of a NaN it is 0
#else
    if (!(steps == steps)) // NaN
    {
        return 0;
    }
    float const low = steps < -128.0F ? -128.0F : steps;
    return static_cast<int8_t>(rintf(low > 127.0F ? 127.0F : low));
#endif
}

#ifdef __CUDA_ARCH__
// Four codes in a word, the first in the lowest byte.
__device__ inline uint32_t roundedWord(float a, float b, float c, float d)
{
    uint32_t high, word;
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;"
        : "=r"(high)
        : "r"(__float2int_rn(d)), "r"(__float2int_rn(c)));
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;"
        : "=r"(word)
        : "r"(__float2int_rn(b)), "r"(__float2int_rn(a)), "r"(high));
    return word;
}
#endif

template <int kWidth>
IQ_HOST_DEVICE Pack<int8_t, kWidth> rounded(Pack<float, kWidth> const& steps)
{
    Pack<int8_t, kWidth> codes;
#ifdef __CUDA_ARCH__
    if constexpr (kWidth % 4 == 0)
    {
        auto* const words = reinterpret_cast<uint32_t*>(codes.at);
        IQ_UNROLL
        for (int j = 0; j < kWidth; j += 4)
        {
            words[j / 4] = roundedWord(
                steps.at[j], steps.at[j + 1], steps.at[j + 2], steps.at[j + 3]);
        }
    }
    else
#endif
    {
        IQ_UNROLL
        for (int j = 0; j < kWidth; ++j)
        {
            codes.at[j] = rounded(steps.at[j]);
        }
    }
    return codes;
}

} // namespace iq
