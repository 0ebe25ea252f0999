#include "iq/template_table.h"

#include <cmath>
#include <stdexcept>
#include <string>

#include <cuda_runtime_api.h>

namespace iq
{
namespace
{

void check(cudaError_t status, char const* what)
{
    if (status != cudaSuccess)
    {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
    }
}

} // namespace

TemplateTable::TemplateTable(std::vector<float> values, int32_t templates, int32_t hidden)
    : mValues(std::move(values))
    , mShape{templates, hidden}
{
    if (templates < 1 || hidden < 1
        || mValues.size() != static_cast<size_t>(templates) * static_cast<size_t>(hidden))
    {
        throw std::invalid_argument("templates has " + std::to_string(mValues.size())
            + " values, which is not template_shape " + std::to_string(templates) + " x "
            + std::to_string(hidden));
    }
    for (float const value : mValues)
    {
        if (!std::isfinite(value))
        {
            throw std::invalid_argument("templates has a value that is not finite");
        }
    }
}

TemplateTable::~TemplateTable()
{
    // A builder on a machine with no GPU never uploads. At the end of the process the driver may be
    // gone already: nothing is left to free then.
    if (mDevice != nullptr)
    {
        static_cast<void>(cudaFree(mDevice));
    }
}

void TemplateTable::upload()
{
    std::lock_guard<std::mutex> const lock(mUploading);
    if (mDevice != nullptr)
    {
        return;
    }
    std::vector<float> content(mValues);
    size_t const hidden = static_cast<size_t>(mShape[1]);
    for (size_t start = 0; start < mValues.size(); start += hidden)
    {
        double square = 0.0;
        for (size_t i = start; i < start + hidden; ++i)
        {
            square += static_cast<double>(mValues[i]) * mValues[i];
        }
        content.push_back(static_cast<float>(square / 2.0));
    }
    size_t const bytes = content.size() * sizeof(float);
    void* device = nullptr;
    check(cudaMalloc(&device, bytes), "no device memory for the templates");
    cudaError_t const copied = cudaMemcpy(device, content.data(), bytes, cudaMemcpyHostToDevice);
    if (copied != cudaSuccess)
    {
        static_cast<void>(cudaFree(device));
        check(copied, "cannot copy the templates to the device");
    }
    mDevice = static_cast<float*>(device);
}

} // namespace iq
