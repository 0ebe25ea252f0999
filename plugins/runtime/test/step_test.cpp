// A C interface to the arithmetic of a step for tests/runtime, on the CPU.
#include "serial.h"

#define IQ_TEST extern "C" __attribute__((visibility("default")))

IQ_TEST int64_t iq_choose(float const* logits, int64_t vocab, float temperature, int32_t topK,
    float topP, double draw)
{
    return iq::SerialRow(logits, vocab, {temperature, topK, topP, 0}).choose(draw);
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

IQ_TEST void iq_inputs(int64_t* valid, int64_t* mask, int64_t* positions, int64_t batch,
    int64_t seq, int64_t total)
{
    iq::serialInputs(valid, mask, positions, batch, seq, total);
}

IQ_TEST void iq_move(unsigned char const* present, unsigned char* past, int64_t heads,
    int64_t rowBytes, int64_t from, int64_t to)
{
    iq::serialMove(present, past, heads, rowBytes, from, to);
}
