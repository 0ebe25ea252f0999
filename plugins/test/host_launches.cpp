// The launches of kernels.h on a CPU: the same rows, with as many workers per row as a test wants.
#include "host_launches.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "iq/dispatch.h"

namespace
{
std::atomic<int32_t> workers{32};
} // namespace

void iq_set_workers(int64_t count)
{
    workers = static_cast<int32_t>(count);
}

namespace iq
{
namespace
{

template <int kWidth, typename T>
int32_t detectRow(T const* row, float const* table, Shape const& shape,
    float threshold, bool first, bool valid)
{
    int32_t const lanes = workers, hidden = static_cast<int32_t>(shape.hidden);
    float peak = 0.0F;
    for (int32_t lane = 0; lane < lanes; ++lane)
    {
        peak = std::max(peak, partialPeak<kWidth, 2>(row, hidden, lane, lanes));
    }
    if (!isSink(peak, threshold, first, valid))
    {
        return 0;
    }
    float best = 0.0F;
    int32_t matched = 0;
    for (int64_t k = 0; k < shape.templates; ++k)
    {
        float distance = 0.0F;
        for (int32_t lane = 0; lane < lanes; ++lane)
        {
            distance += partialDistance<kWidth>(row, table + k * hidden, hidden, lane, lanes);
        }
        if (k == 0 || distance < best)
        {
            best = distance;
            matched = static_cast<int32_t>(k) + 1;
        }
    }
    return matched;
}

template <Change kChange>
cudaError_t changeRows(Element element, void const* x, int32_t const* index, float const* table,
    Shape const& shape, void* y)
{
    return dispatch(
        element, canPack(element, shape.hidden, {x, y, table}), [&](auto type, auto width) {
            using T = decltype(type);
            for (int64_t row = 0; row < shape.rows; ++row)
            {
                int64_t const entry = templateRow(index[row], shape.templates);
                int64_t const at = row * shape.hidden;
                int32_t const lanes = workers;
                for (int32_t lane = 0; lane < lanes; ++lane)
                {
                    changeRow<kChange, decltype(width)::value>(static_cast<T const*>(x) + at,
                        entry < 0 ? nullptr : table + entry * shape.hidden,
                        static_cast<T*>(y) + at, static_cast<int32_t>(shape.hidden), lane, lanes);
                }
            }
            return cudaGetLastError(); // as after a kernel
        });
}

// What a row's workers do between their reductions; `values` takes the norm, if not null.
template <typename T, int kWidth, int kChunks>
void normOneRow(AddNorm const& op, int64_t row, float* values)
{
    int64_t const hidden = op.shape.hidden;
    int32_t const lanes = workers, index = op.index == nullptr ? 0 : op.index[row];
    int8_t const* const inserted = insertedCodes(op, index);
    NormRow<T> const what = normRow<T>(op, row);
    std::vector<RowSlice<T, kWidth, kChunks>> slices;
    for (int32_t lane = 0; lane < lanes; ++lane)
    {
        slices.emplace_back(what, lane, lanes);
    }
    float total = 0.0F, power = 0.0F;
    for (auto const& slice : slices)
    {
        total += slice.partialSum();
    }
    float const middle = what.bias == nullptr ? 0.0F : total / static_cast<float>(hidden);
    for (auto const& slice : slices)
    {
        power += slice.partialPower(middle);
    }
    float const inverse = inverseSize(power, hidden, op.epsilon);
    for (auto const& slice : slices)
    {
        slice.write(middle, inverse, inserted);
        if (values != nullptr)
        {
            slice.eachNormed(middle, inverse, [=](int32_t at, Pack<float, kWidth> const& pack) {
                for (int j = 0; j < kWidth; ++j)
                {
                    values[row * hidden + at + j] = pack.at[j] * op.scale;
                }
            });
        }
    }
}

cudaError_t normRows(Element element, AddNorm const& op, float* values)
{
    return dispatch(element, canPack(element, op), [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int kWidth = decltype(width)::value;
        int64_t const packs = op.shape.hidden / kWidth;
        bool const kept = kWidth > 1 && packs <= 4 * workers;
        for (int64_t row = 0; row < op.shape.rows; ++row)
        {
            if (kept)
            {
                normOneRow<T, kWidth, 4>(op, row, values);
            }
            else
            {
                normOneRow<T, kWidth, 0>(op, row, values);
            }
        }
        return cudaGetLastError(); // as after a kernel
    });
}

template <typename T, int kWidth, int kPer>
void siluMulRow(SiluMul const& op, int64_t row)
{
    GatedRow<T> const what = gatedRow<T>(op, row);
    bool const sink = op.index != nullptr && op.index[row] > 0;
    std::vector<Pack<float, kPer>> all(static_cast<size_t>((op.features + kPer - 1) / kPer));
    for (size_t worker = 0; worker < all.size(); ++worker)
    {
        int32_t const at = static_cast<int32_t>(worker) * kPer;
        GatedPacks<T, kWidth, kPer> packs;
        loadGated(what, at, packs);
        all[worker] = sink ? Pack<float, kPer>{} : products(packs, what.unit);
        takeSide(what, at, all[worker]);
        turnWithin(all[worker], op.block);
    }
    for (int step = kPer; step < op.block; step *= 2)
    {
        auto const before = all;
        size_t const apart = static_cast<size_t>(step / kPer);
        for (size_t worker = 0; worker < all.size(); ++worker)
        {
            for (int j = 0; j < kPer; ++j)
            {
                all[worker].at[j] = turnBetween(before[worker].at[j],
                    before[worker ^ apart].at[j], (worker & apart) != 0 ? -1.0F : 1.0F);
            }
        }
    }
    for (size_t worker = 0; worker < all.size(); ++worker)
    {
        storeCodes<kWidth>(what, static_cast<int32_t>(worker) * kPer, all[worker]);
    }
}

} // namespace

cudaError_t launchDetect(Element element, void const* x, bool const* first, bool const* valid,
    float const* table, float threshold, Shape const& shape, int32_t* index,
    cudaStream_t /*stream*/)
{
    return dispatch(
        element, canPack(element, shape.hidden, {x, table}), [&](auto type, auto width) {
            auto const* const rows = static_cast<decltype(type) const*>(x);
            for (int64_t row = 0; row < shape.rows; ++row)
            {
                index[row] = detectRow<decltype(width)::value>(rows + row * shape.hidden, table,
                    shape, threshold, first[row], valid[row]);
            }
            return cudaGetLastError(); // as after a kernel
        });
}

cudaError_t launchClampInsert(Element element, void const* x, int32_t const* index,
    float const* table, Shape const& shape, void* y, cudaStream_t /*stream*/)
{
    return changeRows<Change::kInsert>(element, x, index, table, shape, y);
}

cudaError_t launchRestore(Element element, void const* x, int32_t const* index, float const* table,
    Shape const& shape, void* y, cudaStream_t /*stream*/)
{
    return changeRows<Change::kRestore>(element, x, index, table, shape, y);
}

cudaError_t launchAddNorm(Element element, AddNorm const& op, cudaStream_t /*stream*/)
{
    return normRows(element, op, nullptr);
}

cudaError_t launchSiluMul(Element element, SiluMul const& op, cudaStream_t /*stream*/)
{
    return dispatch(element, canPack(element, op), [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int kWidth = decltype(width)::value;
        for (int64_t row = 0; row < op.rows; ++row)
        {
            if (elementsPerWorker(op) == kManyPer)
            {
                siluMulRow<T, kWidth, kManyPer>(op, row);
            }
            else
            {
                siluMulRow<T, kWidth, kFewPer>(op, row);
            }
        }
        return cudaGetLastError(); // as after a kernel
    });
}

cudaError_t normValues(Element element, AddNorm const& op, float* values)
{
    return normRows(element, op, values);
}

} // namespace iq
