// The launches of kernels.h on memory that is on the device already, for tools/gpu_check: what is
// timed there is the kernel. Each function returns a cudaError_t.
#include <cuda_runtime_api.h>

#include "iq/kernels.h"

#define IQ_TEST extern "C" __attribute__((visibility("default")))

using iq::Element;

IQ_TEST int iq_launch_detect(int element, void const* x, bool const* first, bool const* valid,
    float const* table, float threshold, int64_t rows, int64_t hidden, int64_t templates,
    int32_t* index, cudaStream_t stream)
{
    return iq::launchDetect(static_cast<Element>(element), x, first, valid, table, threshold,
        {rows, hidden, templates}, index, stream);
}

IQ_TEST int iq_launch_change(int element, bool restore, void const* x, int32_t const* index,
    float const* table, int64_t rows, int64_t hidden, int64_t templates, void* y,
    cudaStream_t stream)
{
    auto* const launch = restore ? iq::launchRestore : iq::launchClampInsert;
    return launch(
        static_cast<Element>(element), x, index, table, {rows, hidden, templates}, y, stream);
}

IQ_TEST int iq_launch_add_norm(int element, void const* x, void const* branch, void const* weight,
    void const* bias, int32_t const* index, int8_t const* inserted, float epsilon, float scale,
    int64_t rows, int64_t hidden, int64_t templates, void* sum, int8_t* codes, cudaStream_t stream)
{
    iq::AddNorm const op{x, branch, weight, bias, index, inserted, epsilon, scale,
        {rows, hidden, templates}, sum, codes};
    return iq::launchAddNorm(static_cast<Element>(element), op, stream);
}

// Without side channels.
IQ_TEST int iq_launch_silu_mul(int element, void const* gate, void const* up, int32_t const* index,
    int block, float factor, float scale, int64_t rows, int64_t features, int8_t* codes,
    cudaStream_t stream)
{
    iq::SiluMul const op{gate, up, index, nullptr, 0, 0, rows, features, block, factor, scale,
        codes, nullptr};
    return iq::launchSiluMul(static_cast<Element>(element), op, stream);
}
