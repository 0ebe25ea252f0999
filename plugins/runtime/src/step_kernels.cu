#include "step_kernels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace iq
{
namespace
{

constexpr int kThreads = 512;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMoveBlocks = 64; // for each cache tensor; the rest is a loop

__device__ float toFloat(float value)
{
    return value;
}

__device__ float toFloat(__half value)
{
    return __half2float(value);
}

__device__ float toFloat(__nv_bfloat16 value)
{
    return __bfloat162float(value);
}

__global__ void inputsKernel(
    int64_t* valid, int64_t* mask, int64_t* positions, int64_t seq, int64_t total)
{
    int64_t const after = validAfter(valid[blockIdx.x], seq);
    for (int64_t column = threadIdx.x; mask != nullptr && column < total; column += blockDim.x)
    {
        mask[blockIdx.x * total + column] = maskAt(after, total, column);
    }
    for (int64_t column = threadIdx.x; positions != nullptr && column < seq; column += blockDim.x)
    {
        positions[blockIdx.x * seq + column] = positionAt(after, seq, column);
    }
    __syncthreads();
    if (threadIdx.x == 0)
    {
        valid[blockIdx.x] = after;
    }
}

template <typename Unit>
__device__ void moveRows(CacheMove const& move, int64_t batch, int64_t from, int64_t to)
{
    int64_t const units = move.rowBytes / static_cast<int64_t>(sizeof(Unit));
    int64_t const all = batch * move.heads * to * units;
    auto const* const present = static_cast<Unit const*>(move.present);
    auto* const past = static_cast<Unit*>(move.past);
    int64_t const stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < all;
         i += stride)
    {
        int64_t const unit = i % units;
        int64_t const row = i / units % to;
        int64_t const head = i / units / to;
        int64_t const source = alignedSource(row, from, to);
        past[i] = source < 0 ? Unit{} : present[(head * from + source) * units + unit];
    }
}

__global__ void movesKernel(CacheMove const* moves, int64_t batch, int64_t from, int64_t to)
{
    CacheMove const move = moves[blockIdx.y];
    if (move.rowBytes % static_cast<int64_t>(sizeof(uint4)) == 0)
    {
        moveRows<uint4>(move, batch, from, to);
    }
    else
    {
        moveRows<uint32_t>(move, batch, from, to);
    }
}

// A row of logits, passed over by one block. Every function ends with all threads in step and the
// same result in each.
template <typename T>
class BlockRow
{
public:
    struct Shared
    {
        double sums[kWarps];
        unsigned long long most[kWarps];
        double parts[kThreads];
        int64_t picked;
    };

    __device__ BlockRow(T const* logits, int64_t vocab, float temperature, Shared& shared)
        : mLogits(logits)
        , mVocab(vocab)
        , mTemperature(temperature)
        , mShared(shared)
    {
    }

    __device__ int64_t size() const
    {
        return mVocab;
    }

    __device__ bool finite()
    {
        // (x - x) is NaN for what is not finite.
        double const bad = sum([](float logit) { return logit - logit == 0.0F ? 0.0 : 1.0; });
        // The largest key first, and of equal ones the first token.
        unsigned long long best = 0;
        for (int64_t i = threadIdx.x; i < mVocab; i += kThreads)
        {
            auto const candidate = static_cast<unsigned long long>(keyOf(at(i))) << 32U
                | (0xFFFFFFFFULL - static_cast<unsigned long long>(i));
            best = candidate > best ? candidate : best;
        }
        mBest = largest(best);
        mPeak = at(firstWith(peakKey()));
        return bad == 0.0;
    }

    __device__ uint32_t peakKey() const
    {
        return static_cast<uint32_t>(mBest >> 32U);
    }

    // Asked for the peak only, whose token `finite` found.
    __device__ int64_t firstWith(uint32_t /*key*/) const
    {
        return static_cast<int64_t>(0xFFFFFFFFULL - (mBest & 0xFFFFFFFFULL));
    }

    __device__ int64_t count(uint32_t key)
    {
        return static_cast<int64_t>(
            sum([key](float logit) { return keyOf(logit) >= key ? 1.0 : 0.0; }));
    }

    __device__ double mass(uint32_t key)
    {
        return sum([this, key](float logit) { return kept(logit, key); });
    }

    __device__ int64_t pick(uint32_t key, double draw)
    {
        int64_t const share = (mVocab + kThreads - 1) / kThreads;
        int64_t const start = threadIdx.x * share;
        int64_t const end = start + share < mVocab ? start + share : mVocab;
        double part = 0.0;
        for (int64_t i = start; i < end; ++i)
        {
            part += kept(at(i), key);
        }
        mShared.parts[threadIdx.x] = part;
        __syncthreads();
        if (threadIdx.x == 0)
        {
            mShared.picked = walk(key, draw, share);
        }
        __syncthreads();
        return mShared.picked;
    }

private:
    __device__ float at(int64_t token) const
    {
        return toFloat(mLogits[token]);
    }

    __device__ double kept(float logit, uint32_t key) const
    {
        return keyOf(logit) >= key ? weightOf(logit, mPeak, mTemperature) : 0.0;
    }

    // To the thread's share where the drawn part of the mass lies, then along it.
    __device__ int64_t walk(uint32_t key, double draw, int64_t share) const
    {
        double total = 0.0;
        for (double const part : mShared.parts)
        {
            total += part;
        }
        double left = draw * total;
        int last = 0;
        for (int thread = 0; thread < kThreads; ++thread)
        {
            if (mShared.parts[thread] == 0.0)
            {
                continue;
            }
            last = thread;
            if (left < mShared.parts[thread])
            {
                break;
            }
            left -= mShared.parts[thread];
        }
        int64_t const start = last * share;
        int64_t token = start;
        for (int64_t i = start; i < start + share && i < mVocab; ++i)
        {
            double const weight = kept(at(i), key);
            if (weight > 0.0)
            {
                token = i;
                if (left < weight)
                {
                    break;
                }
                left -= weight;
            }
        }
        return token;
    }

    template <typename Value>
    __device__ double sum(Value value)
    {
        double mine = 0.0;
        for (int64_t i = threadIdx.x; i < mVocab; i += kThreads)
        {
            mine += value(at(i));
        }
        for (int offset = kWarp / 2; offset > 0; offset /= 2)
        {
            mine += __shfl_down_sync(0xFFFFFFFFU, mine, offset);
        }
        if (threadIdx.x % kWarp == 0)
        {
            mShared.sums[threadIdx.x / kWarp] = mine;
        }
        __syncthreads();
        double all = 0.0;
        for (double const part : mShared.sums)
        {
            all += part;
        }
        __syncthreads();
        return all;
    }

    __device__ unsigned long long largest(unsigned long long mine)
    {
        for (int offset = kWarp / 2; offset > 0; offset /= 2)
        {
            unsigned long long const other = __shfl_down_sync(0xFFFFFFFFU, mine, offset);
            mine = other > mine ? other : mine;
        }
        if (threadIdx.x % kWarp == 0)
        {
            mShared.most[threadIdx.x / kWarp] = mine;
        }
        __syncthreads();
        unsigned long long all = 0;
        for (unsigned long long const part : mShared.most)
        {
            all = part > all ? part : all;
        }
        __syncthreads();
        return all;
    }

    T const* mLogits;
    int64_t mVocab;
    float mTemperature;
    Shared& mShared;
    unsigned long long mBest{0};
    float mPeak{0.0F};
};

template <typename T>
__global__ void __launch_bounds__(kThreads) chooseKernel(T const* logits, int64_t seq,
    int64_t vocab, SamplingRule rule, uint64_t* draws, int64_t* ids, int64_t* chosen)
{
    __shared__ typename BlockRow<T>::Shared shared;
    int64_t const sequence = blockIdx.x;
    BlockRow<T> row(
        logits + ((sequence + 1) * seq - 1) * vocab, vocab, rule.temperature, shared);
    uint64_t const number = draws[sequence];
    int64_t const token
        = choose(row, rule, uniform(rule.seed, static_cast<uint64_t>(sequence), number));
    __syncthreads();
    if (threadIdx.x == 0)
    {
        draws[sequence] = number + 1;
        chosen[sequence] = token;
        ids[sequence] = token < 0 ? 0 : token; // an index out of range must not reach the model
    }
}

} // namespace

cudaError_t launchInputs(int64_t* valid, int64_t* mask, int64_t* positions, int64_t batch,
    int64_t seq, int64_t total, cudaStream_t stream)
{
    inputsKernel<<<static_cast<unsigned int>(batch), kThreads, 0, stream>>>(
        valid, mask, positions, seq, total);
    return cudaGetLastError();
}

cudaError_t launchMoves(CacheMove const* moves, int32_t count, int64_t batch, int64_t from,
    int64_t to, cudaStream_t stream)
{
    dim3 const grid(static_cast<unsigned int>(kMoveBlocks), static_cast<unsigned int>(count));
    movesKernel<<<grid, kThreads, 0, stream>>>(moves, batch, from, to);
    return cudaGetLastError();
}

cudaError_t launchChoose(LogitType type, void const* logits, int64_t batch, int64_t seq,
    int64_t vocab, SamplingRule const& rule, uint64_t* draws, int64_t* ids, int64_t* chosen,
    cudaStream_t stream)
{
    auto const blocks = static_cast<unsigned int>(batch);
    switch (type)
    {
    case LogitType::kFloat:
        chooseKernel<<<blocks, kThreads, 0, stream>>>(
            static_cast<float const*>(logits), seq, vocab, rule, draws, ids, chosen);
        break;
    case LogitType::kHalf:
        chooseKernel<<<blocks, kThreads, 0, stream>>>(
            static_cast<__half const*>(logits), seq, vocab, rule, draws, ids, chosen);
        break;
    case LogitType::kBFloat16:
        chooseKernel<<<blocks, kThreads, 0, stream>>>(
            static_cast<__nv_bfloat16 const*>(logits), seq, vocab, rule, draws, ids, chosen);
        break;
    }
    return cudaGetLastError();
}

} // namespace iq
