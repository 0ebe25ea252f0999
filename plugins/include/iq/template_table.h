// The templates of one op: parsed from plugin fields, serialised with the plan, uploaded once.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

namespace iq
{

// Shared by all clones of a plugin, so that an engine's contexts use one copy on the device. The
// host side never changes after construction.
class TemplateTable
{
public:
    // `values` are `templates` rows of `hidden`, row-major. Throws std::invalid_argument if they
    // are not, or if one is not finite.
    TemplateTable(std::vector<float> values, int32_t templates, int32_t hidden);
    ~TemplateTable();
    TemplateTable(TemplateTable const&) = delete;
    TemplateTable& operator=(TemplateTable const&) = delete;

    int64_t templates() const noexcept
    {
        return mShape[0];
    }
    int64_t hidden() const noexcept
    {
        return mShape[1];
    }
    std::vector<float> const& values() const noexcept
    {
        return mValues;
    }
    int32_t const* shape() const noexcept
    {
        return mShape;
    }

    // Copies the table to the current device, the first time it is called; it throws
    // std::runtime_error where it cannot.
    void upload();

    // Device pointers, null before `upload`: the table, and half the squared norm of each template.
    float const* deviceValues() const noexcept
    {
        return mDevice;
    }
    float const* deviceEnergies() const noexcept
    {
        return mDevice == nullptr ? nullptr : mDevice + mValues.size();
    }

private:
    std::vector<float> mValues;
    int32_t mShape[2];
    std::mutex mUploading;
    float* mDevice{nullptr};
};

} // namespace iq
