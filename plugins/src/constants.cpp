#include "iq/constants.h"

#include "iq/rows.cuh"

namespace iq
{
namespace
{

constexpr size_t kSlotPadding = 16;

template <typename T>
void addCodes(Bytes& codes, std::vector<float> const& templates, float scale)
{
    for (float const entry : templates)
    {
        int8_t const code = rounded(toFloat(fromFloat<T>(entry)) / scale);
        codes.push_back(static_cast<unsigned char>(code));
    }
}

} // namespace

Bytes bytesOf(std::vector<float> const& values)
{
    auto const* const begin = reinterpret_cast<unsigned char const*>(values.data());
    return {begin, begin + values.size() * sizeof(float)};
}

Bytes codeBytes(std::vector<float> const& templates, float scale)
{
    Bytes codes;
    codes.reserve(3 * templates.size());
    addCodes<float>(codes, templates, scale);
    addCodes<__half>(codes, templates, scale);
    addCodes<__nv_bfloat16>(codes, templates, scale);
    return codes;
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
