// The arithmetic of the fused residual Add + norm + insertion + quantizer on one row; it means the
// ONNX functions Add*Norm*Quantize in iq_export/sinks/ops.py.
#pragma once

#include "iq/rows.cuh"

namespace iq
{

// What is done with one row. Pointers are to the row; `bias` is null for an RMSNorm.
template <typename T>
struct NormRow
{
    T const* x;
    T const* branch;
    T* sum;
    int8_t* codes;
    T const* weight;
    T const* bias;
    float scale;
    int32_t hidden;
};

// One worker's packs of the row: all read before the first is written, so that the memory's latency
// is paid once; added, written as the sum, and kept in up to `kChunks` packs of registers. With
// `kChunks` 0 (a row too long for that) the worker reads its sums again.
template <typename T, int kWidth, int kChunks>
class RowSlice
{
public:
    IQ_HOST_DEVICE RowSlice(NormRow<T> const& row, int32_t lane, int32_t lanes)
        : mRow(row)
        , mLane(lane)
        , mLanes(lanes)
    {
        if constexpr (kChunks > 0)
        {
            Pack<T, kWidth> branch[kChunks] = {};
            walk([&](int32_t at, int chunk) {
                mSum[chunk] = load<kWidth>(mRow.x + at);
                branch[chunk] = load<kWidth>(mRow.branch + at);
            });
            walk([&](int32_t at, int chunk) { mWeight[chunk] = load<kWidth>(mRow.weight + at); });
            walk([&](int32_t at, int chunk) { add(at, mSum[chunk], branch[chunk]); });
        }
        else
        {
            walk([this](int32_t at, int /*chunk*/) {
                auto sum = load<kWidth>(mRow.x + at);
                add(at, sum, load<kWidth>(mRow.branch + at));
            });
        }
    }

    // This worker's share of the sum of the row.
    IQ_HOST_DEVICE float partialSum() const
    {
        float total = 0.0F;
        walk([&](int32_t at, int chunk) {
            auto const sum = toFloats(kept(mSum, mRow.sum, at, chunk));
            IQ_UNROLL
            for (float const value : sum.at)
            {
                total += value;
            }
        });
        return total;
    }

    // This worker's share of the sum of (value - middle)^2.
    IQ_HOST_DEVICE float partialPower(float middle) const
    {
        float total = 0.0F;
        walk([&](int32_t at, int chunk) {
            auto const sum = toFloats(kept(mSum, mRow.sum, at, chunk));
            IQ_UNROLL
            for (float const value : sum.at)
            {
                float const centred = value - middle;
                total += centred * centred;
            }
        });
        return total;
    }

    // Calls visit(position, normed values in steps of the scale). `inverse` is
    // 1 / sqrt(mean power + epsilon). One multiplier for the row, no division for an element.
    template <typename Visit>
    IQ_HOST_DEVICE void eachNormed(float middle, float inverse, Visit visit) const
    {
        float const steps = 1.0F / mRow.scale;
        float const gain = inverse * steps;
        walk([&](int32_t at, int chunk) {
            auto values = toFloats(kept(mSum, mRow.sum, at, chunk));
            auto const weight = toFloats(kept(mWeight, mRow.weight, at, chunk));
            IQ_UNROLL
            for (int j = 0; j < kWidth; ++j)
            {
                values.at[j] = (values.at[j] - middle) * gain * weight.at[j];
            }
            if (mRow.bias != nullptr)
            {
                auto const bias = toFloats(load<kWidth>(mRow.bias + at));
                IQ_UNROLL
                for (int j = 0; j < kWidth; ++j)
                {
                    values.at[j] += bias.at[j] * steps;
                }
            }
            visit(at, values);
        });
    }

    // Writes the codes: of the norm, or `inserted`, the template's, where that is not null.
    IQ_HOST_DEVICE void write(float middle, float inverse, int8_t const* inserted) const
    {
        if (inserted != nullptr)
        {
            walk([&](int32_t at, int /*chunk*/) {
                store<kWidth>(mRow.codes + at, load<kWidth>(inserted + at));
            });
            return;
        }
        eachNormed(middle, inverse, [this](int32_t at, Pack<float, kWidth> const& values) {
            store<kWidth>(mRow.codes + at, rounded(values));
        });
    }

private:
    static constexpr int kKept = kChunks > 0 ? kChunks : 1;

    template <typename Visit>
    IQ_HOST_DEVICE void walk(Visit visit) const
    {
        eachPack<kWidth, kChunks>(mRow.hidden, mLane, mLanes, visit);
    }

    IQ_HOST_DEVICE Pack<T, kWidth> kept(
        Pack<T, kWidth> const (&packs)[kKept], T const* row, int32_t at, int chunk) const
    {
        return kChunks > 0 ? packs[chunk] : load<kWidth>(row + at);
    }

    // Adds the branch and writes the row's sum.
    IQ_HOST_DEVICE void add(int32_t at, Pack<T, kWidth>& sum, Pack<T, kWidth> const& branch) const
    {
        auto total = toFloats(sum);
        auto const added = toFloats(branch);
        IQ_UNROLL
        for (int j = 0; j < kWidth; ++j)
        {
            total.at[j] += added.at[j];
        }
        sum = fromFloats<T>(total);
        store<kWidth>(mRow.sum + at, sum);
    }

    NormRow<T> mRow;
    int32_t mLane;
    int32_t mLanes;
    Pack<T, kWidth> mSum[kKept] = {};
    Pack<T, kWidth> mWeight[kKept] = {};
};

IQ_HOST_DEVICE float inverseSize(float power, int64_t hidden, float epsilon)
{
    return 1.0F / sqrtf(power / static_cast<float>(hidden) + epsilon);
}

} // namespace iq
