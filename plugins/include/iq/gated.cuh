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

// One row; `slots` [slotCount] is s + 1 for the channel that is side channel s, 0 for the others.
// `unit` is the quantizer's scale over the transform's factor: a step of the codes, before both.
template <typename T>
struct GatedRow
{
    T const* gate;
    T const* up;
    T* side;
    int8_t* codes;
    uint8_t const* slots;
    int32_t slotCount;
    int32_t features;
    float unit;
};

// A SiLU of less is 0, so that -inf has a value too.
constexpr float kClosedGate = -80.0F;

// SiLU(gate) * up / unit. The division is in the reciprocal, which a SiLU needs anyway. A closed
// gate is taken as the lowest half: the reciprocal of its power is 0.
IQ_HOST_DEVICE float siluMul(float gate, float up, float unit)
{
    constexpr float kLog2E = 1.44269504F;
    float const open = gate < kClosedGate ? kLowest : gate;
#ifdef __CUDA_ARCH__
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-kLog2E * open));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(fmaf(power, unit, unit)));
#else
    float const inverse = 1.0F / fmaf(exp2f(-kLog2E * open), unit, unit);
#endif
    return open * inverse * up;
}

// A worker's elements of the row as they come; none beyond it.
template <typename T, int kWidth, int kPer>
struct GatedPacks
{
    Pack<T, kWidth> gate[kPer / kWidth];
    Pack<T, kWidth> up[kPer / kWidth];
};

template <int kWidth, int kPer, typename T>
IQ_HOST_DEVICE void loadGated(
    GatedRow<T> const& row, int32_t at, GatedPacks<T, kWidth, kPer>& packs)
{
    IQ_UNROLL
    for (int part = 0; part < kPer / kWidth; ++part)
    {
        if (at + part * kWidth < row.features)
        {
            packs.gate[part] = load<kWidth>(row.gate + at + part * kWidth);
            packs.up[part] = load<kWidth>(row.up + at + part * kWidth);
        }
        else
        {
            packs.gate[part] = {};
            packs.up[part] = {};
        }
    }
}

template <typename T, int kWidth, int kPer>
IQ_HOST_DEVICE Pack<float, kPer> products(GatedPacks<T, kWidth, kPer> const& packs, float unit)
{
    Pack<float, kPer> values;
    IQ_UNROLL
    for (int part = 0; part < kPer / kWidth; ++part)
    {
        auto const gate = toFloats(packs.gate[part]), up = toFloats(packs.up[part]);
        IQ_UNROLL
        for (int j = 0; j < kWidth; ++j)
        {
            values.at[part * kWidth + j] = siluMul(gate.at[j], up.at[j], unit);
        }
    }
    return values;
}

// Writes the side channels among a worker's elements, and sets them to 0.
template <int kPer, typename T>
IQ_HOST_DEVICE void takeSide(GatedRow<T> const& row, int32_t at, Pack<float, kPer>& values)
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
            row.side[slots.at[j] - 1] = fromFloat<T>(values.at[j] * row.unit);
            values.at[j] = 0.0F;
        }
    }
}

// The rounds of the transform between elements of one worker.
template <int kPer>
IQ_HOST_DEVICE void turnWithin(Pack<float, kPer>& values, int32_t block)
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

// One element of a round between two workers. `sign` is -1 for the upper of them, else 1.
IQ_HOST_DEVICE float turnBetween(float own, float other, float sign)
{
    return fmaf(own, sign, other);
}

template <int kWidth, int kPer, typename T>
IQ_HOST_DEVICE void storeCodes(GatedRow<T> const& row, int32_t at, Pack<float, kPer> const& values)
{
    auto const codes = rounded(values);
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
