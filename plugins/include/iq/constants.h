// An op's constants as its kernels read them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace iq
{

using Bytes = std::vector<unsigned char>;

// A template table, row after row.
Bytes bytesOf(std::vector<float> const& values);

// A template table as int8 codes: three tables, of the templates as float, half and bfloat16 round
// them, in the order of iq::Element.
Bytes codeBytes(std::vector<float> const& templates, float scale);

// For each channel up to the last side channel s + 1 if it is side channel s, else 0; padded with 0
// to a multiple of 16. The channels are distinct, not negative, and at most kMostSides.
constexpr size_t kMostSides = 255;
Bytes slotBytes(std::vector<int32_t> const& channels);

} // namespace iq
