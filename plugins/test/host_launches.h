#pragma once

#include "iq/kernels.h"

extern "C" __attribute__((visibility("default"))) void iq_set_workers(int64_t count);

namespace iq
{

// As launchAddNorm, and what is quantized to `values` [rows, hidden].
cudaError_t normValues(Element element, AddNorm const& op, float* values);

} // namespace iq
