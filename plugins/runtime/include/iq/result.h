// Errors as values: no exception leaves this library, and nothing in it ends the process.
#pragma once

#include <string>
#include <utility>
#include <variant>
#include <vector>

#define IQ_API __attribute__((visibility("default")))

namespace iq
{

// The exit codes of the Python command (iq_export/errors.py).
enum class ErrorCode
{
    kOther = 1,
    kUsage = 2,
    kData = 4,
    kGraph = 5,
    kEngine = 6,
    kBundle = 7
};

// `text` with '?' for its control characters: what a file holds must not command a terminal.
IQ_API std::string printable(std::string const& text);

// One row of a table of differences.
struct Mismatch
{
    std::string what;
    std::string expected;
    std::string found;
};

struct Error
{
    ErrorCode code{ErrorCode::kOther};
    std::string message; // one sentence: what, where, what to do
    std::vector<Mismatch> mismatches{};

    // The message, and below it the mismatches as a table.
    IQ_API std::string text() const;
};

// A value or an Error. `value()` may be called only if it is true, `error()` only if it is false.
template <typename T>
class [[nodiscard]] Result
{
public:
    Result(T value)
        : mState(std::in_place_index<0>, std::move(value))
    {
    }
    Result(Error error)
        : mState(std::in_place_index<1>, std::move(error))
    {
    }

    explicit operator bool() const noexcept
    {
        return mState.index() == 0;
    }
    T& value() & noexcept
    {
        return *std::get_if<0>(&mState);
    }
    T const& value() const& noexcept
    {
        return *std::get_if<0>(&mState);
    }
    T&& value() && noexcept
    {
        return std::move(*std::get_if<0>(&mState));
    }
    Error const& error() const noexcept
    {
        return *std::get_if<1>(&mState);
    }

private:
    std::variant<T, Error> mState;
};

using Status = Result<std::monostate>;

} // namespace iq
