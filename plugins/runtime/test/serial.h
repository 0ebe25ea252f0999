// The kernels of a step, done serially.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "sampling.h"
#include "step.h"

namespace iq
{

// The largest key for which `holds`, which is true for all keys up to some one; 0 must be such.
template <typename Holds>
uint32_t largestKey(Holds holds)
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

// How a token is chosen: equal logits share their fate, and the draw goes by the order of tokens.
class SerialRow
{
public:
    SerialRow(float const* logits, int64_t vocab, SamplingRule const& rule)
        : mLogits(logits)
        , mVocab(vocab)
        , mRule(rule)
    {
    }

    // The token, or -1 if a logit is not finite. `draw` lies in [0, 1).
    int64_t choose(double draw)
    {
        int64_t best = 0;
        for (int64_t i = 0; i < mVocab; ++i)
        {
            if (!std::isfinite(mLogits[i]))
            {
                return -1;
            }
            best = mLogits[i] > mLogits[best] ? i : best;
        }
        if (mRule.temperature <= 0.0F)
        {
            return best;
        }
        float const scale = scaleOf(mRule.temperature);
        for (int64_t i = 0; i < mVocab; ++i)
        {
            mKeys.push_back(keyOf(mLogits[i]));
            mWeights.push_back(weightOf(mLogits[best] - mLogits[i], scale));
        }
        uint32_t least = 0;
        if (mRule.topK > 0 && mRule.topK < mVocab)
        {
            least = largestKey([&](uint32_t key) { return count(key) >= mRule.topK; });
        }
        if (mRule.topP < 1.0F)
        {
            // A token is kept if those before it have less than the wanted part of the mass.
            uint64_t const wanted = wantedOf(mRule.topP, mass(least));
            least = largestKey([&](uint32_t key) { return mass(key) >= wanted; });
        }
        return pick(least, targetOf(draw, mass(least)));
    }

private:
    int64_t count(uint32_t key) const
    {
        return std::count_if(
            mKeys.begin(), mKeys.end(), [key](uint32_t other) { return other >= key; });
    }

    uint64_t mass(uint32_t key) const
    {
        uint64_t sum = 0;
        for (int64_t i = 0; i < mVocab; ++i)
        {
            sum += kept(i, key);
        }
        return sum;
    }

    int64_t pick(uint32_t key, uint64_t target) const
    {
        int64_t token = 0;
        while (target >= kept(token, key))
        {
            target -= kept(token, key);
            ++token;
        }
        return token;
    }

    uint64_t kept(int64_t token, uint32_t key) const
    {
        auto const at = static_cast<size_t>(token);
        return mKeys[at] >= key ? mWeights[at] : 0;
    }

    float const* mLogits;
    int64_t mVocab;
    SamplingRule mRule;
    std::vector<uint32_t> mKeys;
    std::vector<uint64_t> mWeights;
};

// valid [batch], mask [batch, total], positions [batch, seq].
inline void serialInputs(int64_t* valid, int64_t* mask, int64_t* positions, int64_t batch,
    int64_t seq, int64_t total)
{
    for (int64_t b = 0; b < batch; ++b)
    {
        valid[b] = validAfter(valid[b], seq);
        for (int64_t column = 0; column < total; ++column)
        {
            mask[b * total + column] = maskAt(valid[b], total, column);
        }
        for (int64_t column = 0; column < seq; ++column)
        {
            positions[b * seq + column] = positionAt(valid[b], seq, column);
        }
    }
}

// present [heads, from, row] -> past [heads, to, row], rows of bytes.
inline void serialMove(unsigned char const* present, unsigned char* past, int64_t heads,
    int64_t rowBytes, int64_t from, int64_t to)
{
    for (int64_t head = 0; head < heads; ++head)
    {
        for (int64_t row = 0; row < to; ++row)
        {
            int64_t const source = alignedSource(row, from, to);
            unsigned char* const target = past + (head * to + row) * rowBytes;
            for (int64_t byte = 0; byte < rowBytes; ++byte)
            {
                target[byte]
                    = source < 0 ? 0 : present[(head * from + source) * rowBytes + byte];
            }
        }
    }
}

} // namespace iq
