// A C interface to the arithmetic of a step for tests/runtime: on the CPU, with a serial Row.
#include <cmath>

#include "sampling.h"

#define IQ_TEST extern "C" __attribute__((visibility("default")))

namespace
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
        return iq::keyOf(mPeak);
    }

    int64_t firstWith(uint32_t key) const
    {
        int64_t token = 0;
        while (iq::keyOf(mLogits[token]) != key)
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
            found += iq::keyOf(mLogits[i]) >= key ? 1 : 0;
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
        return iq::keyOf(logit) >= key ? iq::weightOf(logit, mPeak, mTemperature) : 0.0;
    }

    float const* mLogits;
    int64_t mVocab;
    float mTemperature;
    float mPeak{0.0F};
};

} // namespace

IQ_TEST int64_t iq_choose(float const* logits, int64_t vocab, float temperature, int32_t topK,
    float topP, double draw)
{
    SerialRow row(logits, vocab, temperature);
    return iq::choose(row, {temperature, topK, topP, 0}, draw);
}

IQ_TEST uint32_t iq_key(float value)
{
    return iq::keyOf(value);
}

IQ_TEST double iq_uniform(uint64_t seed, uint64_t row, uint64_t step)
{
    return iq::uniform(seed, row, step);
}

IQ_TEST int64_t iq_window(int64_t used, int64_t maxPast)
{
    return iq::windowFor(used, maxPast);
}

IQ_TEST int64_t iq_chunk(int64_t done, int64_t longest, int64_t maxSeq)
{
    return iq::chunkAfter(done, longest, maxSeq);
}

// As the kernel: valid [batch], mask [batch, total], positions [batch, seq].
IQ_TEST void iq_inputs(int64_t* valid, int64_t* mask, int64_t* positions, int64_t batch,
    int64_t seq, int64_t total)
{
    for (int64_t b = 0; b < batch; ++b)
    {
        valid[b] = iq::validAfter(valid[b], seq);
        for (int64_t column = 0; column < total; ++column)
        {
            mask[b * total + column] = iq::maskAt(valid[b], total, column);
        }
        for (int64_t column = 0; column < seq; ++column)
        {
            positions[b * seq + column] = iq::positionAt(valid[b], seq, column);
        }
    }
}

// present [heads, from, row] -> past [heads, to, row], rows of bytes.
IQ_TEST void iq_move(unsigned char const* present, unsigned char* past, int64_t heads,
    int64_t rowBytes, int64_t from, int64_t to)
{
    for (int64_t head = 0; head < heads; ++head)
    {
        for (int64_t row = 0; row < to; ++row)
        {
            int64_t const source = iq::alignedSource(row, from, to);
            unsigned char* const target = past + (head * to + row) * rowBytes;
            for (int64_t byte = 0; byte < rowBytes; ++byte)
            {
                target[byte] = source < 0
                    ? 0
                    : present[(head * from + source) * rowBytes + byte];
            }
        }
    }
}
