// TensorRT and the driver, opened by name: nothing of them is linked.
#pragma once

#include <cstdint>
#include <string>

#include "iq/bundle.h"

namespace iq
{

// The TensorRT library at `path`, or the one of that flavour and major version by its usual name.
// It stays in the process: TensorRT and its plugins do not survive being unloaded. Null, with the
// reason in `why`, if it is not there.
void* openTensorRt(Flavour flavour, int32_t major, std::string const& path, std::string& why);

// What the library says of itself. False if it is no TensorRT.
bool askVersion(void* library, TensorRt& version) noexcept;

} // namespace iq
