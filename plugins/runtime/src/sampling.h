// How a token is chosen from logits, for host and device.
//
// No sort: the least logit that is kept is found by halving the range of its bits, 32 passes over
// the row at most. `Row` does the passes, serially or by a block of threads; every thread calls
// these functions and gets the same result.
#pragma once

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

// What a token weighs beside the likeliest one.
IQ_HOST_DEVICE double weightOf(float logit, float peak, float temperature)
{
    return static_cast<double>(expf((logit - peak) / temperature));
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

// The largest key for which `holds`, which is true for all keys up to some one; 0 must be such.
template <typename Holds>
IQ_HOST_DEVICE uint32_t largestKey(Holds holds)
{
    uint32_t key = 0;
    for (uint32_t bit = 0x80000000U; bit != 0U; bit >>= 1U)
    {
        if (holds(key | bit))
        {
            key |= bit;
        }
    }
    return key;
}

// The token, or -1 if a logit is not finite. `draw` lies in [0, 1). A Row has
//   finite()               whether every logit is
//   peakKey()              the largest key
//   count(key)             tokens of at least that key
//   mass(key)              their weight together
//   firstWith(key)         the first token of that key
//   pick(key, draw)        the token at that part of the mass, in order of tokens
template <typename Row>
IQ_HOST_DEVICE int64_t choose(Row& row, SamplingRule const& rule, double draw)
{
    if (!row.finite())
    {
        return -1;
    }
    if (rule.temperature <= 0.0F)
    {
        return row.firstWith(row.peakKey());
    }
    uint32_t least = 0;
    if (rule.topK > 0 && rule.topK < row.size())
    {
        least = largestKey([&](uint32_t key) { return row.count(key) >= rule.topK; });
    }
    if (rule.topP < 1.0F)
    {
        // A token is kept if those before it have less than the wanted part of the mass.
        double const wanted = static_cast<double>(rule.topP) * row.mass(least);
        least = largestKey([&](uint32_t key) { return row.mass(key) >= wanted; });
    }
    return row.pick(least, draw);
}

} // namespace iq
