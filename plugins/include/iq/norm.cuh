// The arithmetic of the fused residual Add + norm + insertion + quantizer on one row; it means the
// ONNX functions Add*Norm*Quantize in iq_export/sinks/ops.py.
#pragma once

#include "iq/rows.cuh"

namespace iq
{

// What is done with one row. Pointers are to the row; `bias` is null for an RMSNorm, `entry` (the
// template) for a semantic token.
template <typename T>
struct NormRow
{
    T const* x;
    T const* branch;
    T* sum;
    int8_t* codes;
    T const* weight;
    T const* bias;
    float const* entry;
    float scale;
    int64_t hidden;
};

// One worker's packs of the row: read once, added, written as the sum, and kept in up to `kChunks`
// packs of registers. With `kChunks` 0 (a row too long for that) the worker reads its sums again.
template <typename T, int kWidth, int kChunks>
class RowSlice
{
public:
    IQ_HOST_DEVICE RowSlice(NormRow<T> const& row, int64_t lane, int64_t lanes)
        : mRow(row)
        , mLane(lane)
        , mLanes(lanes)
    {
        walk([this](int64_t at, int chunk) {
            auto const x = load<kWidth>(mRow.x + at);
            auto const branch = load<kWidth>(mRow.branch + at);
            Pack<T, kWidth> sum;
            IQ_UNROLL
            for (int j = 0; j < kWidth; ++j)
            {
                sum.at[j] = fromFloat<T>(toFloat(x.at[j]) + toFloat(branch.at[j]));
            }
            store<kWidth>(mRow.sum + at, sum);
            if constexpr (kChunks > 0)
            {
                mKept[chunk] = sum;
            }
        });
    }

    // This worker's share of the sum of the row.
    IQ_HOST_DEVICE float partialSum() const
    {
        float total = 0.0F;
        eachPack([&total](int64_t /*at*/, Pack<T, kWidth> const& pack) {
            IQ_UNROLL
            for (int j = 0; j < kWidth; ++j)
            {
                total += toFloat(pack.at[j]);
            }
        });
        return total;
    }

    // This worker's share of the sum of (value - middle)^2.
    IQ_HOST_DEVICE float partialPower(float middle) const
    {
        float total = 0.0F;
        eachPack([&total, middle](int64_t /*at*/, Pack<T, kWidth> const& pack) {
            IQ_UNROLL
            for (int j = 0; j < kWidth; ++j)
            {
                float const centred = toFloat(pack.at[j]) - middle;
                total += centred * centred;
            }
        });
        return total;
    }

    // Calls visit(position, values to quantize). `inverse` is 1 / sqrt(mean power + epsilon).
    template <typename Visit>
    IQ_HOST_DEVICE void eachValue(float middle, float inverse, Visit visit) const
    {
        eachPack([this, middle, inverse, &visit](int64_t at, Pack<T, kWidth> const& pack) {
            visit(at, mRow.entry == nullptr ? normed(at, pack, middle, inverse) : inserted(at));
        });
    }

    IQ_HOST_DEVICE void write(float middle, float inverse) const
    {
        eachValue(middle, inverse, [this](int64_t at, Pack<float, kWidth> const& values) {
            Pack<int8_t, kWidth> codes;
            IQ_UNROLL
            for (int j = 0; j < kWidth; ++j)
            {
                codes.at[j] = quantized(values.at[j], mRow.scale);
            }
            store<kWidth>(mRow.codes + at, codes);
        });
    }

private:
    // Calls visit(position, number of the pack) for each pack of this worker.
    template <typename Visit>
    IQ_HOST_DEVICE void walk(Visit visit) const
    {
        if constexpr (kChunks > 0)
        {
            IQ_UNROLL
            for (int chunk = 0; chunk < kChunks; ++chunk)
            {
                int64_t const at = (mLane + chunk * mLanes) * kWidth;
                if (at < mRow.hidden)
                {
                    visit(at, chunk);
                }
            }
        }
        else
        {
            for (int64_t at = mLane * kWidth; at < mRow.hidden; at += mLanes * kWidth)
            {
                visit(at, 0);
            }
        }
    }

    template <typename Visit>
    IQ_HOST_DEVICE void eachPack(Visit visit) const
    {
        walk([this, &visit](int64_t at, int chunk) {
            if constexpr (kChunks > 0)
            {
                visit(at, mKept[chunk]);
            }
            else
            {
                visit(at, load<kWidth>(mRow.sum + at));
            }
        });
    }

    IQ_HOST_DEVICE Pack<float, kWidth> normed(
        int64_t at, Pack<T, kWidth> const& pack, float middle, float inverse) const
    {
        auto const weight = load<kWidth>(mRow.weight + at);
        Pack<float, kWidth> values;
        IQ_UNROLL
        for (int j = 0; j < kWidth; ++j)
        {
            float const unit = (toFloat(pack.at[j]) - middle) * inverse;
            values.at[j] = unit * toFloat(weight.at[j]);
        }
        if (mRow.bias != nullptr)
        {
            auto const bias = load<kWidth>(mRow.bias + at);
            IQ_UNROLL
            for (int j = 0; j < kWidth; ++j)
            {
                values.at[j] += toFloat(bias.at[j]);
            }
        }
        return values;
    }

    // The template as it is in the row's type.
    IQ_HOST_DEVICE Pack<float, kWidth> inserted(int64_t at) const
    {
        auto values = loadEntries<kWidth>(mRow.entry + at);
        IQ_UNROLL
        for (int j = 0; j < kWidth; ++j)
        {
            values.at[j] = toFloat(fromFloat<T>(values.at[j]));
        }
        return values;
    }

    NormRow<T> mRow;
    int64_t mLane;
    int64_t mLanes;
    Pack<T, kWidth> mKept[kChunks > 0 ? kChunks : 1];
};

IQ_HOST_DEVICE float inverseSize(float power, int64_t hidden, float epsilon)
{
    return 1.0F / sqrtf(power / static_cast<float>(hidden) + epsilon);
}

} // namespace iq
