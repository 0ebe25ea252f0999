// longjmp from stack to stack is what happens here, and no fault.
#undef _FORTIFY_SOURCE
#include "cuda_runtime_api.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include <ucontext.h>

dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulated
{
namespace
{

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;

enum class Wait
{
    kNone,
    kWarp,
    kBlock,
    kDone
};

struct Thread
{
    std::unique_ptr<char[]> stack{new char[kStack]};
    ucontext_t start{};
    jmp_buf here{};
    bool started{false};
    Wait wait{Wait::kNone};
    int exchanges{0};
};

struct Warp
{
    uint64_t given[2][kWarp]{};
};

std::vector<Thread> threads;
std::vector<Warp> warps;
std::function<void()> const* body = nullptr;
jmp_buf scheduler;
uint64_t turns = 88172645463325252ULL;

void leave(Wait wait)
{
    Thread& self = threads[threadIdx.x];
    self.wait = wait;
    if (_setjmp(self.here) == 0)
    {
        _longjmp(scheduler, 1);
    }
}

void enter()
{
    (*body)();
    leave(Wait::kDone);
}

void resume(unsigned int index)
{
    threadIdx.x = index;
    Thread& thread = threads[index];
    if (_setjmp(scheduler) != 0)
    {
        return;
    }
    if (thread.started)
    {
        _longjmp(thread.here, 1);
    }
    thread.started = true;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.get();
    thread.start.uc_stack.ss_size = kStack;
    makecontext(&thread.start, enter, 0);
    setcontext(&thread.start);
}

// Until all of its lanes wait for the block or are done.
void runWarp(unsigned int warp)
{
    for (;;)
    {
        int waiting = 0;
        int ran = 0;
        for (unsigned int i = warp * kWarp; i < (warp + 1) * kWarp; ++i)
        {
            if (threads[i].wait == Wait::kNone)
            {
                resume(i);
                ++ran;
            }
            waiting += threads[i].wait == Wait::kWarp ? 1 : 0;
        }
        if (waiting == kWarp)
        {
            for (unsigned int i = warp * kWarp; i < (warp + 1) * kWarp; ++i)
            {
                threads[i].wait = Wait::kNone;
            }
        }
        else if (waiting != 0 && ran == 0)
        {
            std::fputs("lanes of a warp wait for others, which left\n", stderr);
            std::abort();
        }
        else if (ran == 0)
        {
            return;
        }
    }
}

void runBlock()
{
    for (Thread& thread : threads)
    {
        thread.started = false;
        thread.wait = Wait::kNone;
    }
    for (bool more = true; more;)
    {
        // Another order each time: nothing may depend on it.
        turns ^= turns << 13U;
        turns ^= turns >> 7U;
        turns ^= turns << 17U;
        for (size_t i = 0; i < warps.size(); ++i)
        {
            runWarp(static_cast<unsigned int>((i + turns) % warps.size()));
        }
        size_t waiting = 0;
        for (Thread& thread : threads)
        {
            waiting += thread.wait == Wait::kBlock ? 1U : 0U;
        }
        if (waiting != 0 && waiting != threads.size())
        {
            std::fputs("threads of a block wait for others, which left\n", stderr);
            std::abort();
        }
        more = waiting != 0;
        for (Thread& thread : threads)
        {
            thread.wait = more ? Wait::kNone : thread.wait;
        }
    }
}

} // namespace

void run(dim3 grid, dim3 block, std::function<void()> const& kernel)
{
    gridDim = grid;
    blockDim = block;
    body = &kernel;
    threads.resize(block.x);
    warps.resize(block.x / kWarp);
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    {
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
        {
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
            {
                runBlock();
            }
        }
    }
}

void waitForBlock()
{
    leave(Wait::kBlock);
}

uint64_t const* exchange(uint64_t mine)
{
    Warp& warp = warps[threadIdx.x / kWarp];
    uint64_t* const given = warp.given[threads[threadIdx.x].exchanges++ % 2];
    given[threadIdx.x % kWarp] = mine;
    leave(Wait::kWarp);
    return given;
}

} // namespace emulated
