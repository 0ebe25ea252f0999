// Launches of the sink ops' kernels. All pointers are device pointers; nothing synchronises.
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

// Rows of a tensor [rows, hidden] against a table [templates, hidden] of float.
struct Shape
{
    int64_t rows;
    int64_t hidden;
    int64_t templates;
};

// index[row] = 0 for a semantic token, k + 1 for a sink nearest to template k. `energies[k]` is
// half the squared norm of template k.
cudaError_t launchDetect(Element element, void const* x, bool const* first, bool const* valid,
    float const* table, float const* energies, float threshold, Shape const& shape, int32_t* index,
    cudaStream_t stream);

// y = the template of sink rows, x elsewhere. x and y may be the same.
cudaError_t launchClampInsert(Element element, void const* x, int32_t const* index,
    float const* table, Shape const& shape, void* y, cudaStream_t stream);

// y = x + the template on sink rows, x elsewhere. x and y may be the same.
cudaError_t launchRestore(Element element, void const* x, int32_t const* index, float const* table,
    Shape const& shape, void* y, cudaStream_t stream);

} // namespace iq
