// Messages to the logger of the TensorRT that loaded this library; to stderr before there is one,
// and where that TensorRT is of another major version than the headers here.
#pragma once

#include <exception>
#include <string>

#include <NvInferRuntime.h>

namespace iq
{

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

void logError(std::string const& message) noexcept;

// Runs `action`, logs what it throws, and returns `fallback` then: no exception may reach TensorRT.
template <typename Result, typename Action>
Result guarded(char const* where, Result fallback, Action action) noexcept
{
    try
    {
        return action();
    }
    catch (std::exception const& error)
    {
        logError(std::string(where) + ": " + error.what());
    }
    catch (...)
    {
        logError(std::string(where) + ": unknown exception");
    }
    return fallback;
}

} // namespace iq
