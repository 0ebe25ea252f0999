#pragma once

namespace iq::test
{

// Pointers of the fake cudaMalloc that are not freed.
int liveAllocations();

} // namespace iq::test
