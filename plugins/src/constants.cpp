#include "iq/constants.h"

namespace iq
{
namespace
{

constexpr size_t kSlotPadding = 16;

Bytes bytesOf(std::vector<float> const& values)
{
    auto const* const begin = reinterpret_cast<unsigned char const*>(values.data());
    return {begin, begin + values.size() * sizeof(float)};
}

} // namespace

Bytes tableBytes(std::vector<float> const& values, int64_t templates, int64_t hidden)
{
    std::vector<float> content(values);
    for (int64_t k = 0; k < templates; ++k)
    {
        double square = 0.0;
        for (int64_t i = 0; i < hidden; ++i)
        {
            double const value = values[static_cast<size_t>(k * hidden + i)];
            square += value * value;
        }
        content.push_back(static_cast<float>(square / 2.0));
    }
    return bytesOf(content);
}

Bytes slotBytes(std::vector<int32_t> const& channels)
{
    Bytes slots;
    unsigned char number = 0;
    for (int32_t const channel : channels)
    {
        auto const at = static_cast<size_t>(channel);
        if (at >= slots.size())
        {
            slots.resize((at / kSlotPadding + 1) * kSlotPadding);
        }
        slots[at] = ++number;
    }
    return slots;
}

} // namespace iq
