// From a launch's arguments to the types and pointers of one row: shared by the kernels and by the
// tests, which run the same rows on a CPU.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "iq/gated.cuh"
#include "iq/kernels.h"
#include "iq/norm.cuh"
#include "iq/rows.cuh"

namespace iq
{

inline bool isEmpty(int64_t rows, int64_t hidden)
{
    return rows == 0 || hidden == 0;
}

inline int64_t packOf(Element element)
{
    return element == Element::kFloat ? kVector<float> : kVector<__half>;
}

inline bool isAligned(std::initializer_list<void const*> pointers, uintptr_t bytes)
{
    for (void const* const pointer : pointers)
    {
        if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) // null is aligned
        {
            return false;
        }
    }
    return true;
}

// Whether rows of `hidden` elements can be accessed 16 bytes at a time.
inline bool canPack(Element element, int64_t hidden, std::initializer_list<void const*> pointers)
{
    return hidden % packOf(element) == 0 && isAligned(pointers, 16);
}

inline bool canPack(Element element, AddNorm const& op)
{
    return canPack(element, op.shape.hidden,
               {op.x, op.branch, op.weight, op.bias, op.sum})
        && isAligned({op.codes, op.inserted}, 8);
}

inline int elementsPerWorker(SiluMul const& op)
{
    return op.block > kFewPer * 32 ? kManyPer : kFewPer;
}

inline bool canPack(Element element, SiluMul const& op)
{
    int const per = elementsPerWorker(op);
    return canPack(element, op.features, {op.gate, op.up}) && op.features % per == 0
        && isAligned({op.codes}, static_cast<uintptr_t>(per));
}

// Calls start(T{}, width) with the type of `element` and an integral_constant: the elements of 16
// bytes, or 1.
template <typename Start>
cudaError_t dispatch(Element element, bool packed, Start start)
{
    auto const typed = [&](auto type) {
        using T = decltype(type);
        return packed ? start(type, std::integral_constant<int, kVector<T>>{})
                      : start(type, std::integral_constant<int, 1>{});
    };
    switch (element)
    {
    case Element::kFloat: return typed(float{});
    case Element::kHalf: return typed(__half{});
    case Element::kBFloat16: return typed(__nv_bfloat16{});
    }
    return cudaErrorInvalidValue;
}

template <typename T>
IQ_HOST_DEVICE NormRow<T> normRow(AddNorm const& op, int64_t row)
{
    int64_t const at = row * op.shape.hidden;
    return {static_cast<T const*>(op.x) + at, static_cast<T const*>(op.branch) + at,
        static_cast<T*>(op.sum) + at, op.codes + at, static_cast<T const*>(op.weight),
        static_cast<T const*>(op.bias), op.scale, static_cast<int32_t>(op.shape.hidden)};
}

// The codes that a row of this index gets; null for a semantic token.
IQ_HOST_DEVICE int8_t const* insertedCodes(AddNorm const& op, int32_t index)
{
    int64_t const entry = templateRow(index, op.shape.templates);
    return entry < 0 ? nullptr : op.inserted + entry * op.shape.hidden;
}

template <typename T>
IQ_HOST_DEVICE GatedRow<T> gatedRow(SiluMul const& op, int64_t row)
{
    int64_t const at = row * op.features;
    return {static_cast<T const*>(op.gate) + at, static_cast<T const*>(op.up) + at,
        static_cast<T*>(op.side) + row * op.sides, op.codes + at, op.slots,
        static_cast<int32_t>(op.slotCount), static_cast<int32_t>(op.features),
        op.scale / op.factor};
}

} // namespace iq
