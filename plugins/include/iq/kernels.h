// Launches of the ops' kernels. All pointers are device pointers; nothing allocates or waits, so a
// launch can be captured in a CUDA graph. Any alignment and any size will do: what is aligned
// to 16 bytes and made of whole packs is read and written 16 bytes at a time.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

namespace iq
{

enum class Element
{
    kFloat,
    kHalf,
    kBFloat16
};

// Of the Hadamard transform.
constexpr int32_t kLargestBlock = 512;

// Elements of a row at most: kernels count them with 32 bits.
constexpr int64_t kLongestRow = 1 << 30;

// Rows of a tensor [rows, hidden] against a table [templates, hidden] of float.
struct Shape
{
    int64_t rows;
    int64_t hidden;
    int64_t templates;
};

// index[row] = 0 for a semantic token, k + 1 for a sink nearest to template k.
cudaError_t launchDetect(Element element, void const* x, bool const* first, bool const* valid,
    float const* table, float threshold, Shape const& shape, int32_t* index, cudaStream_t stream);

// y = the template of sink rows, x elsewhere. x and y may be the same.
cudaError_t launchClampInsert(Element element, void const* x, int32_t const* index,
    float const* table, Shape const& shape, void* y, cudaStream_t stream);

// y = x + the template on sink rows, x elsewhere. x and y may be the same.
cudaError_t launchRestore(Element element, void const* x, int32_t const* index, float const* table,
    Shape const& shape, void* y, cudaStream_t stream);

// sum = x + branch; codes = the quantized norm of the sum, on sink rows those of `inserted`
// [templates, hidden]. `bias` is null for an RMSNorm, `index` and `inserted` where there is no
// insertion.
struct AddNorm
{
    void const* x;
    void const* branch;
    void const* weight;
    void const* bias;
    int32_t const* index;
    int8_t const* inserted;
    float epsilon;
    float scale;
    Shape shape;
    void* sum;
    int8_t* codes;
};

cudaError_t launchAddNorm(Element element, AddNorm const& op, cudaStream_t stream);

// codes = the quantized block Hadamard transform of SiLU(gate) * up without its side channels; they
// go to `side` [rows, sides]. All are 0 on sink rows. `index` may be null, and `slots` with `side`.
// `slots` is described in gated.cuh; `slotCount` is a multiple of 16 and it is aligned so.
struct SiluMul
{
    void const* gate;
    void const* up;
    int32_t const* index;
    uint8_t const* slots;
    int64_t slotCount;
    int64_t sides;
    int64_t rows;
    int64_t features;
    int32_t block; // a power of two up to kLargestBlock that divides `features`
    float factor;
    float scale;
    int8_t* codes;
    void* side;
};

cudaError_t launchSiluMul(Element element, SiluMul const& op, cudaStream_t stream);

} // namespace iq
