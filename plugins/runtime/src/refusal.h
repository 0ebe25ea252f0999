// Inside the library a failure is thrown as a Refusal; every public function turns it into a value.
#pragma once

#include <exception>
#include <new>
#include <string>
#include <utility>

#include "iq/result.h"

namespace iq
{

struct Refusal : std::exception
{
    explicit Refusal(Error why)
        : error(std::move(why))
    {
    }
    Refusal(ErrorCode code, std::string message)
        : error{code, std::move(message)}
    {
    }
    char const* what() const noexcept override
    {
        return error.message.c_str();
    }

    Error error;
};

template <typename T, typename Action>
Result<T> guarded(Action action)
{
    try
    {
        return action();
    }
    catch (Refusal const& refusal)
    {
        return refusal.error;
    }
    catch (std::bad_alloc const&)
    {
        return Error{ErrorCode::kOther, "out of memory"};
    }
    catch (std::exception const& error)
    {
        return Error{ErrorCode::kOther, error.what()};
    }
}

} // namespace iq
