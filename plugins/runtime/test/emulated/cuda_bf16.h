// bfloat16 as a kernel reads it.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16
{
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value)
{
    uint32_t const bits = static_cast<uint32_t>(value.bits) << 16U;
    float number = 0.0F;
    memcpy(&number, &bits, sizeof(number));
    return number;
}
