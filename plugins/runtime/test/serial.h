// The kernels of a step, done serially.
#pragma once

#include <cmath>
#include <cstdint>

#include "sampling.h"
#include "step.h"

namespace iq
{

class SerialRow
{
public:
    SerialRow(float const* logits, int64_t vocab, float temperature)
        : mLogits(logits)
        , mVocab(vocab)
        , mTemperature(temperature)
    {
    }

    int64_t size() const
    {
        return mVocab;
    }

    bool finite()
    {
        bool good = true;
        for (int64_t i = 0; i < mVocab; ++i)
        {
            good = good && std::isfinite(mLogits[i]);
            mPeak = i == 0 || mLogits[i] > mPeak ? mLogits[i] : mPeak;
        }
        return good;
    }

    uint32_t peakKey() const
    {
        return keyOf(mPeak);
    }

    int64_t firstWith(uint32_t key) const
    {
        int64_t token = 0;
        while (keyOf(mLogits[token]) != key)
        {
            ++token;
        }
        return token;
    }

    int64_t count(uint32_t key) const
    {
        int64_t found = 0;
        for (int64_t i = 0; i < mVocab; ++i)
        {
            found += keyOf(mLogits[i]) >= key ? 1 : 0;
        }
        return found;
    }

    double mass(uint32_t key) const
    {
        double sum = 0.0;
        for (int64_t i = 0; i < mVocab; ++i)
        {
            sum += kept(i, key);
        }
        return sum;
    }

    int64_t pick(uint32_t key, double draw) const
    {
        double left = draw * mass(key);
        int64_t token = 0;
        for (int64_t i = 0; i < mVocab; ++i)
        {
            double const weight = kept(i, key);
            if (weight > 0.0)
            {
                token = i;
                if (left < weight)
                {
                    break;
                }
                left -= weight;
            }
        }
        return token;
    }

private:
    double kept(int64_t token, uint32_t key) const
    {
        float const logit = mLogits[token];
        return keyOf(logit) >= key ? weightOf(logit, mPeak, mTemperature) : 0.0;
    }

    float const* mLogits;
    int64_t mVocab;
    float mTemperature;
    float mPeak{0.0F};
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
