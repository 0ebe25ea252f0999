#include "iq/log.h"

#include <atomic>
#include <cstdio>

namespace iq
{
namespace
{
std::atomic<nvinfer1::ILoggerFinder*> loggerFinder{nullptr};
} // namespace

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    loggerFinder = finder;
}

void logError(std::string const& message) noexcept
{
    auto* const finder = loggerFinder.load();
    auto* const logger = finder == nullptr ? nullptr : finder->findLogger();
    if (logger == nullptr)
    {
        std::fprintf(stderr, "iq plugins: %s\n", message.c_str());
        return;
    }
    logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
}

} // namespace iq
