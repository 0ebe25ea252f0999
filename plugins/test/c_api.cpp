// The launches of kernels.h for tests/plugins, from host memory to host memory. Linked with the
// kernels it runs on a GPU, linked with host_launches.cpp and fake_cuda.cpp on a CPU. Each function
// returns a cudaError_t. `shift`: elements by which tensors miss the alignment of cudaMalloc.
#include <algorithm>
#include <vector>

#include <cuda_runtime_api.h>

#include "iq/constants.h"
#include "iq/kernels.h"
#ifdef IQ_HOST
#include "host_launches.h"
#endif

#define IQ_TEST extern "C" __attribute__((visibility("default")))

namespace
{

using iq::Element;

size_t bytesOf(int element)
{
    return static_cast<Element>(element) == Element::kFloat ? 4 : 2;
}

// Device memory of `count` elements: a copy of `host`, and copied back there if it is an output.
class Tensor
{
public:
    template <typename T>
    Tensor(T* host, int64_t count, size_t elementBytes, int64_t shift = 0)
        : mHost(const_cast<void*>(static_cast<void const*>(host)))
        , mBytes(static_cast<size_t>(count) * elementBytes)
        , mOffset(static_cast<size_t>(shift) * elementBytes)
    {
        if (host == nullptr)
        {
            return;
        }
        status = cudaMalloc(&mDevice, std::max<size_t>(mBytes + mOffset, 1));
        if (status == cudaSuccess)
        {
            status = cudaMemcpy(as<char>(), mHost, mBytes, cudaMemcpyHostToDevice);
        }
    }
    ~Tensor()
    {
        static_cast<void>(cudaFree(mDevice));
    }
    Tensor(Tensor const&) = delete;
    Tensor& operator=(Tensor const&) = delete;

    template <typename T>
    T* as() const
    {
        return mDevice == nullptr ? nullptr
                                  : reinterpret_cast<T*>(static_cast<char*>(mDevice) + mOffset);
    }
    cudaError_t read() const
    {
        return mHost == nullptr ? cudaSuccess
                                : cudaMemcpy(mHost, as<char>(), mBytes, cudaMemcpyDeviceToHost);
    }

    cudaError_t status{cudaSuccess};

private:
    void* mHost;
    size_t mBytes;
    size_t mOffset;
    void* mDevice{nullptr};
};

cudaError_t finish(cudaError_t launched, std::vector<Tensor const*> const& tensors,
    std::vector<Tensor const*> const& outputs)
{
    for (Tensor const* const tensor : tensors)
    {
        if (tensor->status != cudaSuccess)
        {
            return tensor->status;
        }
    }
    for (Tensor const* const output : outputs)
    {
        cudaError_t const read = launched == cudaSuccess ? output->read() : launched;
        if (read != cudaSuccess)
        {
            return read;
        }
    }
    return launched;
}

} // namespace

// Number of usable GPUs; 0 without a driver.
IQ_TEST int iq_gpu_count()
{
    int devices = 0;
    return cudaGetDeviceCount(&devices) == cudaSuccess ? devices : 0;
}

IQ_TEST int iq_detect(int element, void const* x, bool const* first, bool const* valid,
    float const* table, float threshold, int64_t rows, int64_t hidden, int64_t templates,
    int64_t shift, int32_t* index)
{
    iq::Shape const shape{rows, hidden, templates};
    Tensor const deviceX(x, rows * hidden, bytesOf(element), shift);
    Tensor const deviceFirst(first, rows, 1), deviceValid(valid, rows, 1);
    Tensor const deviceTable(table, templates * hidden, sizeof(float));
    Tensor const deviceIndex(index, rows, sizeof(int32_t));
    auto const launched = iq::launchDetect(static_cast<Element>(element), deviceX.as<void>(),
        deviceFirst.as<bool>(), deviceValid.as<bool>(), deviceTable.as<float>(), threshold,
        shape, deviceIndex.as<int32_t>(), nullptr);
    return finish(launched,
        {&deviceX, &deviceFirst, &deviceValid, &deviceTable, &deviceIndex}, {&deviceIndex});
}

IQ_TEST int iq_change(int element, bool restore, void const* x, int32_t const* index,
    float const* table, int64_t rows, int64_t hidden, int64_t templates, int64_t shift, void* y)
{
    iq::Shape const shape{rows, hidden, templates};
    Tensor const deviceX(x, rows * hidden, bytesOf(element), shift);
    Tensor const deviceIndex(index, rows, sizeof(int32_t));
    Tensor const deviceTable(table, templates * hidden, sizeof(float));
    Tensor const deviceY(y, rows * hidden, bytesOf(element), shift);
    auto* const launch = restore ? iq::launchRestore : iq::launchClampInsert;
    auto const launched = launch(static_cast<Element>(element), deviceX.as<void>(),
        deviceIndex.as<int32_t>(), deviceTable.as<float>(), shape, deviceY.as<void>(), nullptr);
    return finish(launched, {&deviceX, &deviceIndex, &deviceTable, &deviceY}, {&deviceY});
}

// `bias`, and `index` with `table`, may be null. `values`, null on a GPU, takes the norm.
IQ_TEST int iq_add_norm(int element, void const* x, void const* branch, void const* weight,
    void const* bias, int32_t const* index, float const* table, float epsilon, float scale,
    int64_t rows, int64_t hidden, int64_t templates, int64_t shift, void* sum, int8_t* codes,
    [[maybe_unused]] float* values)
{
    size_t const size = bytesOf(element);
    iq::Shape const shape{rows, hidden, templates};
    Tensor const deviceX(x, rows * hidden, size, shift);
    Tensor const deviceBranch(branch, rows * hidden, size, shift);
    Tensor const deviceWeight(weight, hidden, size, shift), deviceBias(bias, hidden, size, shift);
    Tensor const deviceIndex(index, rows, sizeof(int32_t));
    auto const inserted = table == nullptr
        ? iq::Bytes{}
        : iq::codeBytes(std::vector<float>(table, table + templates * hidden), scale);
    Tensor const deviceInserted(
        table == nullptr ? nullptr : inserted.data() + element * templates * hidden,
        templates * hidden, 1, shift);
    Tensor const deviceSum(sum, rows * hidden, size, shift);
    Tensor const deviceCodes(codes, rows * hidden, 1, shift);
    iq::AddNorm const op{deviceX.as<void>(), deviceBranch.as<void>(), deviceWeight.as<void>(),
        deviceBias.as<void>(), deviceIndex.as<int32_t>(), deviceInserted.as<int8_t>(), epsilon,
        scale, shape, deviceSum.as<void>(), deviceCodes.as<int8_t>()};
#ifdef IQ_HOST
    auto const launched = iq::normValues(static_cast<Element>(element), op, values);
#else
    auto const launched = iq::launchAddNorm(static_cast<Element>(element), op, nullptr);
#endif
    return finish(launched,
        {&deviceX, &deviceBranch, &deviceWeight, &deviceBias, &deviceIndex, &deviceInserted,
            &deviceSum, &deviceCodes},
        {&deviceSum, &deviceCodes});
}

// `index`, and `channels` with `side`, may be null.
IQ_TEST int iq_silu_mul(int element, void const* gate, void const* up, int32_t const* index,
    int32_t const* channels, int64_t sides, int block, float factor, float scale, int64_t rows,
    int64_t features, int64_t shift, int8_t* codes, void* side)
{
    size_t const size = bytesOf(element);
    auto const slots = channels == nullptr
        ? iq::Bytes{}
        : iq::slotBytes(std::vector<int32_t>(channels, channels + sides));
    Tensor const deviceGate(gate, rows * features, size, shift);
    Tensor const deviceUp(up, rows * features, size, shift);
    Tensor const deviceIndex(index, rows, sizeof(int32_t));
    Tensor const deviceSlots(
        channels == nullptr ? nullptr : slots.data(), static_cast<int64_t>(slots.size()), 1);
    Tensor const deviceCodes(codes, rows * features, 1, shift);
    Tensor const deviceSide(side, rows * sides, size, shift);
    iq::SiluMul const op{deviceGate.as<void>(), deviceUp.as<void>(), deviceIndex.as<int32_t>(),
        deviceSlots.as<uint8_t>(), static_cast<int64_t>(slots.size()), sides, rows, features, block,
        factor, scale, deviceCodes.as<int8_t>(), deviceSide.as<void>()};
    auto const launched = iq::launchSiluMul(static_cast<Element>(element), op, nullptr);
    return finish(launched,
        {&deviceGate, &deviceUp, &deviceIndex, &deviceSlots, &deviceCodes, &deviceSide},
        {&deviceCodes, &deviceSide});
}
