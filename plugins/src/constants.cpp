#include "iq/constants.h"

namespace iq
{
namespace
{

constexpr size_t kSlotPadding = 16;

} // namespace

Bytes bytesOf(std::vector<float> const& values)
{
    auto const* const begin = reinterpret_cast<unsigned char const*>(values.data());
    return {begin, begin + values.size() * sizeof(float)};
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
