// What is chosen from logits, for host and device: test/serial.h has the whole definition, and the
// kernels give the same token from the same draw, on every GPU and in every order of threads. For
// that weights are integers, whose sums are exact, and the float arithmetic behind them is one that
// IEEE 754 rounds in one way only: no expf, whose last bits differ, and no a * b + c that a
// compiler may fuse or not.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "step.h"

namespace iq
{

// As iq::Sampling, for a kernel's arguments.
struct SamplingRule
{
    float temperature{0.0F};
    int32_t topK{0};
    float topP{1.0F};
    uint64_t seed{0};
};

// Grows with the value: -inf gives the least key of a number.
IQ_HOST_DEVICE uint32_t keyOf(float value)
{
    uint32_t bits = 0;
    // +0.0 and -0.0 are the same logit.
    float const number = value == 0.0F ? 0.0F : value;
    memcpy(&bits, &number, sizeof(bits));
    return (bits >> 31U) != 0U ? ~bits : bits | 0x80000000U;
}

// The value of a key, but for the sign of zero.
IQ_HOST_DEVICE float valueOf(uint32_t key)
{
    uint32_t const bits = (key >> 31U) != 0U ? key & 0x7FFFFFFFU : ~key;
    float value = 0.0F;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

constexpr int kWeightBits = 40;     // the likeliest token weighs 2^40
constexpr float kOctaves = 41.0F;   // and what is so many halvings below it weighs nothing
constexpr float kRound = 12582912.0F; // 1.5 * 2^23: added to a small float, it leaves an integer
                                      // in the last 22 bits

// Halvings of the weight for each unit of a logit.
inline float scaleOf(float temperature)
{
    float const scale = 1.44269504F / temperature;
    return scale < FLT_MAX ? scale : FLT_MAX; // 0 * inf would make the likeliest one NaN
}

// What a token weighs whose logit is `below` the largest: 2^(kWeightBits - below * scale), rounded
// down. The sum of 2^23 weights fits 64 bits, and what the rounding takes from a vocabulary of
// 150,000 is less than 2^-22 of it.
IQ_HOST_DEVICE uint64_t weightOf(float below, float scale)
{
    if (!(below * scale < kOctaves))
    {
        return 0;
    }
    float const shifted = fmaf(below, scale, kRound);
    float const part = fmaf(below, scale, kRound - shifted); // -0.5 .. 0.5
    // 2^-part, to 8e-8.
    float power = 0x1.41fbbap-13F;
    power = fmaf(power, part, -0x1.5f3e54p-10F);
    power = fmaf(power, part, 0x1.3b2d4cp-7F);
    power = fmaf(power, part, -0x1.c6aee8p-5F);
    power = fmaf(power, part, 0x1.ebfbdcp-3F);
    power = fmaf(power, part, -0x1.62e43p-1F);
    power = fmaf(power, part, 1.0F);
    uint32_t whole = 0;
    uint32_t bits = 0;
    memcpy(&whole, &shifted, sizeof(whole));
    memcpy(&bits, &power, sizeof(bits));
    uint32_t const mantissa = (bits & 0x7FFFFFU) | 0x800000U;
    uint32_t const shift = (whole & 0xFFU) + 127U - (bits >> 23U);
    return (static_cast<uint64_t>(mantissa) << (kWeightBits - 23)) >> shift;
}

// The least mass of the likeliest tokens that is a share `topP` of `mass`.
IQ_HOST_DEVICE uint64_t wantedOf(float topP, uint64_t mass)
{
    double const share = ceil(static_cast<double>(topP) * static_cast<double>(mass));
    uint64_t const wanted = share < 1.0 ? 1 : static_cast<uint64_t>(share);
    return wanted < mass ? wanted : mass;
}

// Where in `mass`, 0 .. mass - 1, a draw from [0, 1) falls.
IQ_HOST_DEVICE uint64_t targetOf(double draw, uint64_t mass)
{
    auto const target = static_cast<uint64_t>(draw * static_cast<double>(mass));
    return target < mass ? target : mass - 1;
}

// A number in [0, 1) for a row (of fewer than 2^20) and a step: splitmix64 of a counter, twice.
IQ_HOST_DEVICE double uniform(uint64_t seed, uint64_t row, uint64_t step)
{
    uint64_t bits = seed + 0x9E3779B97F4A7C15ULL * (1 + (step << 20U) + row);
    for (int round = 0; round < 2; ++round)
    {
        bits = (bits ^ (bits >> 30U)) * 0xBF58476D1CE4E5B9ULL;
        bits = (bits ^ (bits >> 27U)) * 0x94D049BB133111EBULL;
        bits ^= bits >> 31U;
    }
    return static_cast<double>(bits >> 11U) * (1.0 / 9007199254740992.0);
}

} // namespace iq
