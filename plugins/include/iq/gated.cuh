// The arithmetic of the fused input of a down-projection: SiLU(gate) x up, zero for sinks, side
// channels taken out, block Hadamard transform, quantizer. The meaning is the ONNX functions
// SiluMul*Quantize in iq_export/sinks/ops.py.
//
// A worker holds `kPer` neighbouring elements; a Hadamard block is block / kPer neighbours of one
// warp, or less than one worker. The transform is the fast one: log2(block) rounds of sums
// and differences, first within a worker, then between workers.
#pragma once

#include "iq/kernels.h"
#include "iq/rows.cuh"

namespace iq
{

// A worker's elements: 32 workers of a warp hold a whole block.
constexpr int kFewPer = 8;   // blocks up to 256
constexpr int kManyPer = 16; // blocks of 512

// A SiLU of less is 0 in float; it is set, so that -inf has a value too.
constexpr float kClosedGate = -80.0F;

// One row; `slots` [slotCount] is s + 1 for the channel that is side channel s, 0 for the others.
template <typename T>
struct GatedRow
{
    T const* gate;
    T const* up;
    T* side;
    int8_t* codes;
    uint8_t const* slots;
    int64_t slotCount;
    int64_t features;
    float factor;
    float scale;
};

IQ_HOST_DEVICE float siluMul(float gate, float up)
{
    float const active = gate < kClosedGate ? 0.0F : gate / (expf(-gate) + 1.0F);
    return active * up;
}

template <int kPer>
struct Turned
{
    float at[kPer];
};

// The products of a worker's elements from `at` on; 0 beyond the row.
template <int kWidth, int kPer, typename T>
IQ_HOST_DEVICE void loadProducts(GatedRow<T> const& row, int64_t at, Turned<kPer>& values)
{
    IQ_UNROLL
    for (int part = 0; part < kPer; part += kWidth)
    {
        bool const inside = at + part < row.features;
        Pack<T, kWidth> gate, up;
        if (inside)
        {
            gate = load<kWidth>(row.gate + at + part);
            up = load<kWidth>(row.up + at + part);
        }
        IQ_UNROLL
        for (int j = 0; j < kWidth; ++j)
        {
            values.at[part + j]
                = inside ? siluMul(toFloat(gate.at[j]), toFloat(up.at[j])) : 0.0F;
        }
    }
}

// Writes the side channels among a worker's elements, and sets them to 0.
template <int kPer, typename T>
IQ_HOST_DEVICE void takeSide(GatedRow<T> const& row, int64_t at, Turned<kPer>& values)
{
    if (at >= row.slotCount)
    {
        return;
    }
    auto const slots = load<kPer>(row.slots + at); // padded to whole workers
    IQ_UNROLL
    for (int j = 0; j < kPer; ++j)
    {
        if (slots.at[j] != 0)
        {
            row.side[slots.at[j] - 1] = fromFloat<T>(values.at[j]);
            values.at[j] = 0.0F;
        }
    }
}

// The rounds of the transform between elements of one worker.
template <int kPer>
IQ_HOST_DEVICE void turnWithin(Turned<kPer>& values, int32_t block)
{
    IQ_UNROLL
    for (int step = 1; step < kPer; step *= 2)
    {
        if (step < block)
        {
            IQ_UNROLL
            for (int j = 0; j < kPer; ++j)
            {
                if ((j & step) == 0)
                {
                    float const low = values.at[j], high = values.at[j | step];
                    values.at[j] = low + high;
                    values.at[j | step] = low - high;
                }
            }
        }
    }
}

// One element of a round between two workers: `own` and the other's, which is `upper` or not.
IQ_HOST_DEVICE float turnBetween(float own, float other, bool upper)
{
    return upper ? other - own : own + other;
}

template <int kWidth, int kPer, typename T>
IQ_HOST_DEVICE void storeCodes(GatedRow<T> const& row, int64_t at, Turned<kPer> const& values)
{
    Pack<int8_t, kPer> codes;
    IQ_UNROLL
    for (int j = 0; j < kPer; ++j)
    {
        codes.at[j] = quantized(values.at[j] * row.factor, row.scale);
    }
    if constexpr (kWidth > 1) // the row is a whole number of workers
    {
        if (at < row.features)
        {
            store<kPer>(row.codes + at, codes);
        }
    }
    else
    {
        IQ_UNROLL
        for (int j = 0; j < kPer; ++j)
        {
            if (at + j < row.features)
            {
                row.codes[at + j] = codes.at[j];
            }
        }
    }
}

} // namespace iq
