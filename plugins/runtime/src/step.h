// The plan of a step, for host and device.
//
// A batch is padded on the left, as iq_export/run/ort.py `left_pad` does it, and so is the cache:
// its window of past rows is as long as the step's shape says, the tokens stand at its right end.
// Prefill goes in chunks over a window of exactly what was read; decode over a window that is
// rounded up, so that its shapes, and with them a CUDA graph, last for many steps. Each step leaves
// `past + seq` rows, of which the last ones become the next window.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define IQ_HOST_DEVICE __host__ __device__ inline
#else
#define IQ_HOST_DEVICE inline
#endif

namespace iq
{

constexpr int64_t kWindowStep = 128;

// Tokens of a sequence that a step of `seq` columns leaves, `before` of them there already. It is
// negative while only padding was read: it begins at length - longest.
IQ_HOST_DEVICE int64_t validAfter(int64_t before, int64_t seq)
{
    return before + seq;
}

// Whether a column of the window and the step, `total` together, holds a token.
IQ_HOST_DEVICE int64_t maskAt(int64_t valid, int64_t total, int64_t column)
{
    return column >= total - valid ? 1 : 0;
}

// The position of a column of the step; 0 for padding.
IQ_HOST_DEVICE int64_t positionAt(int64_t valid, int64_t seq, int64_t column)
{
    int64_t const position = valid - seq + column;
    return position > 0 ? position : 0;
}

// The row that comes to stand at `row` when `from` rows become a window of `to`; negative for none.
IQ_HOST_DEVICE int64_t alignedSource(int64_t row, int64_t from, int64_t to)
{
    return row + from - to;
}

// Columns of the next chunk of a prompt of `longest`, after `done` of them.
inline int64_t chunkAfter(int64_t done, int64_t longest, int64_t maxSeq)
{
    int64_t const left = longest - done;
    return left < maxSeq ? left : maxSeq;
}

// The window of a decode step over `used` rows, at most `maxPast` of them.
inline int64_t windowFor(int64_t used, int64_t maxPast)
{
    int64_t const rounded = (used + kWindowStep - 1) / kWindowStep * kWindowStep;
    return rounded < maxPast ? rounded : maxPast;
}

} // namespace iq
