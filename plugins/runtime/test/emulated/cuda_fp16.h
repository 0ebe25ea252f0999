// Half precision as a kernel reads it.
#pragma once

#include <cmath>
#include <cstdint>

struct __half
{
    uint16_t bits;
};

inline float __half2float(__half value)
{
    int const exponent = value.bits >> 10U & 31U;
    int const fraction = value.bits & 1023U;
    float size = std::ldexp(static_cast<float>(fraction), -24);
    if (exponent == 31)
    {
        size = fraction == 0 ? INFINITY : NAN;
    }
    else if (exponent > 0)
    {
        size = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    }
    return (value.bits >> 15U) != 0U ? -size : size;
}
