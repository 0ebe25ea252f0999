#pragma once

namespace iq::test
{

// Pointers of the fake cudaMalloc that are not freed.
int liveAllocations();

// The next cudaMalloc finds no memory.
void failNextAllocation();

} // namespace iq::test
