// Sampling: four kernels in a row, of which all but the last have several blocks, or tiles, for
// each row of logits.
//
//   peak     the largest and the least logit of every tile
//   bins     what lies in each of kBins equal ranges of logits below the peak: tokens (top-k) or
//            their mass (top-p alone)
//   border   finds the bin that the rule's border lies in; marks the tokens that may be on either
//            side, and sums the weights of those that are kept for sure
//   choose   one block: the exact border among the marked tokens, a digit of their keys at a time;
//            then the drawn token
//
// Greedy needs the first and the last, sampling without top-k and top-p not the second. Marked
// tokens are few and fit shared memory, or are all equal and need no look; where neither holds, the
// last kernel passes over the row in their stead. All sums are of integers: their order is free.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"
#include "step_kernels.h"

namespace iq
{
namespace
{

constexpr int kThreads = 512;
constexpr int kChooseThreads = 1024;
constexpr int kWarp = 32;
constexpr unsigned int kAllLanes = 0xFFFFFFFFU;
constexpr int kPack = 8; // neighbouring logits that a thread reads at once
constexpr int kBins = 1024;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kMostTiles = 64;
constexpr int kBlocksWanted = 264; // of all rows together; each has bins to clear and to add
constexpr int kListed = 4096;      // marked tokens in shared memory at most
constexpr int kCrowd = 8;          // lanes with one bin that are summed before they are added
constexpr uint64_t kNotFinite = ~0ULL;

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

// How a row is divided. Packs are counted from the last aligned address before the row, so that
// up to 7 elements of the first one and of the last one are not of the row.
struct Tiling
{
    uint32_t vocab{0};
    uint32_t packs{0};     // of a row, wherever it begins; a multiple of 4
    uint32_t tilePacks{0}; // a multiple of kThreads
    uint32_t tiles{0};
};

Tiling tilingOf(int64_t batch, int64_t vocab)
{
    auto const up = [](int64_t value, int64_t step) { return (value + step - 1) / step * step; };
    int64_t const packs = up((vocab + 2 * (kPack - 1)) / kPack, 4);
    int64_t tiles = kBlocksWanted / batch;
    tiles = tiles > kMostTiles ? kMostTiles : (tiles < 1 ? 1 : tiles);
    int64_t const tilePacks = up((packs + tiles - 1) / tiles, kThreads);
    tiles = (packs + tilePacks - 1) / tilePacks;
    return {static_cast<uint32_t>(vocab), static_cast<uint32_t>(packs),
        static_cast<uint32_t>(tilePacks), static_cast<uint32_t>(tiles)};
}

struct Extremes
{
    uint64_t best; // key of the largest logit, then ~token: the first one of equal ones
    float least;
};

// Bins below `sure` are kept, those from there to `last` have the border, the others are dropped.
struct Border
{
    uint32_t sure;
    uint32_t last;
    uint64_t wanted; // tokens or mass to keep of the bins between
};

// What is marked in a tile, or in a row.
struct Marked
{
    unsigned long long mass;
    uint32_t ones; // bits that a key has, and that a key lacks
    uint32_t zeros;
};

// What the kernels leave to each other for one row; the marks of its packs follow.
struct RowWork
{
    unsigned long long bins[kBins];
    unsigned long long sums[kMostTiles]; // mass that is kept for sure
    Marked marked[kMostTiles];
    Extremes extremes[kMostTiles];
    Border border;
};

struct Work
{
    unsigned char* memory{nullptr};
    size_t rowBytes{0};

    __device__ RowWork& row() const
    {
        return *reinterpret_cast<RowWork*>(memory + blockIdx.x * rowBytes);
    }

    // A bit for each element of each pack.
    __device__ unsigned char* marks() const
    {
        return memory + blockIdx.x * rowBytes + sizeof(RowWork);
    }
};

size_t rowWorkBytes(uint32_t packs)
{
    constexpr size_t kAlign = 256;
    return (sizeof(RowWork) + packs + kAlign - 1) / kAlign * kAlign;
}

struct Pack
{
    // The first one, which the others move up for: registers have no index at run time.
    __device__ float next()
    {
        float const first = logits[0];
        for (int k = 1; k < kPack; ++k)
        {
            logits[k - 1] = logits[k];
        }
        return first;
    }

    float logits[kPack];
    uint32_t valid; // a bit for each
};

// The row of logits of this block's sequence. A place is an index from the aligned address.
template <typename T>
struct Row
{
    __device__ Row(T const* logits, int64_t seq, int64_t vocab)
    {
        T const* const first = logits + ((blockIdx.x + 1) * seq - 1) * vocab;
        begin = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(first) / sizeof(T) % kPack);
        end = begin + static_cast<uint32_t>(vocab);
        base = first - begin;
    }

    __device__ Pack load(uint32_t pack) const
    {
        uint32_t const first = pack * kPack;
        Pack result;
        if (first >= begin && first + kPack <= end)
        {
            constexpr int kLoads = kPack * sizeof(T) / sizeof(uint4);
            uint4 raw[kLoads];
            for (int i = 0; i < kLoads; ++i)
            {
                raw[i] = reinterpret_cast<uint4 const*>(base + first)[i];
            }
            T values[kPack];
            memcpy(values, raw, sizeof(values));
            for (int i = 0; i < kPack; ++i)
            {
                result.logits[i] = toFloat(values[i]);
            }
            result.valid = (1U << kPack) - 1U;
            return result;
        }
        result.valid = 0;
        for (int i = 0; i < kPack; ++i)
        {
            bool const inside = first + i >= begin && first + i < end;
            result.logits[i] = inside ? toFloat(base[first + i]) : 0.0F;
            result.valid |= inside ? 1U << i : 0U;
        }
        return result;
    }

    __device__ float at(uint32_t place) const
    {
        return toFloat(base[place]);
    }

    T const* base;
    uint32_t begin;
    uint32_t end;
};

__device__ unsigned long long warpSum(unsigned long long mine)
{
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
    {
        mine += __shfl_xor_sync(kAllLanes, mine, offset);
    }
    return mine;
}

__device__ Marked join(Marked const& a, Marked const& b)
{
    return {a.mass + b.mass, a.ones | b.ones, a.zeros | b.zeros};
}

__device__ Marked warpMarked(Marked mine)
{
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
    {
        mine = join(mine, {__shfl_xor_sync(kAllLanes, mine.mass, offset),
                              __shfl_xor_sync(kAllLanes, mine.ones, offset),
                              __shfl_xor_sync(kAllLanes, mine.zeros, offset)});
    }
    return mine;
}

// Of the whole row, for every thread, without a barrier.
__device__ Marked rowMarked(RowWork const& work, uint32_t tiles)
{
    Marked mine{0, 0, 0};
    for (uint32_t tile = threadIdx.x % kWarp; tile < tiles; tile += kWarp)
    {
        mine = join(mine, work.marked[tile]);
    }
    return warpMarked(mine);
}

// Sums of the lanes before this one, and of this one too.
template <typename Value>
__device__ Value warpPrefix(Value mine)
{
    int const lane = threadIdx.x % kWarp;
    for (int offset = 1; offset < kWarp; offset *= 2)
    {
        Value const other = __shfl_up_sync(kAllLanes, mine, offset);
        mine += lane >= offset ? other : Value{0};
    }
    return mine;
}

// The sum of the threads before this one; `total` is that of all. `shared` is free again after the
// block's next barrier.
template <int threads, typename Value>
__device__ Value blockPrefix(Value mine, Value (&shared)[kWarp], Value& total)
{
    constexpr int kWarps = threads / kWarp;
    int const lane = threadIdx.x % kWarp;
    int const warp = threadIdx.x / kWarp;
    Value const within = warpPrefix(mine);
    if (lane == kWarp - 1)
    {
        shared[warp] = within;
    }
    __syncthreads();
    Value const sums = warpPrefix(lane < kWarps ? shared[lane] : Value{0});
    total = __shfl_sync(kAllLanes, sums, kWarp - 1);
    Value const before = __shfl_sync(kAllLanes, sums, warp > 0 ? warp - 1 : 0);
    return (warp > 0 ? before : Value{0}) + within - mine;
}

__device__ Extremes join(Extremes const& a, Extremes const& b)
{
    return {a.best > b.best ? a.best : b.best, a.least < b.least ? a.least : b.least};
}

__device__ Extremes warpExtremes(Extremes mine)
{
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
    {
        auto const best = static_cast<unsigned long long>(mine.best);
        mine = join(mine, {__shfl_xor_sync(kAllLanes, best, offset),
                              __shfl_xor_sync(kAllLanes, mine.least, offset)});
    }
    return mine;
}

// Of the whole row, from those of its tiles; for every thread, without a barrier.
__device__ Extremes rowExtremes(RowWork const& work, uint32_t tiles)
{
    Extremes mine{0, INFINITY};
    for (uint32_t tile = threadIdx.x % kWarp; tile < tiles; tile += kWarp)
    {
        mine = join(mine, work.extremes[tile]);
    }
    return warpExtremes(mine);
}

// Where a logit stands below the peak. A bin's logits are larger than those of the bins after it.
struct Scale
{
    __device__ Scale(Extremes const& row, float halvings)
        : peak(valueOf(static_cast<uint32_t>(row.best >> 32U)))
        , scale(halvings)
    {
        float const span = fminf((peak - row.least) * scale, kOctaves);
        bins = fminf((kBins - 1) / span, FLT_MAX);
    }

    __device__ float octaves(float logit) const
    {
        return (peak - logit) * scale;
    }

    // Of a logit that weighs something: less than kOctaves.
    __device__ uint32_t bin(float octaves) const
    {
        float const shifted = fmaf(octaves, bins, kRound);
        uint32_t bits = 0;
        memcpy(&bits, &shifted, sizeof(bits));
        return bits & (kBins - 1);
    }

    __device__ unsigned long long weight(float logit) const
    {
        return weightOf(peak - logit, scale);
    }

    float peak;
    float scale;
    float bins;
};

// Sums of 64 bits in shared memory, which adds 32 bits at a time.
template <int size>
struct Histogram
{
    template <int threads>
    __device__ void clear()
    {
        for (int i = threadIdx.x; i < size; i += threads)
        {
            low[i] = 0;
            high[i] = 0;
        }
    }

    // By all lanes of a warp, with 0 where there is nothing to add. A bin that many lanes have is
    // summed first: they would wait for each other.
    __device__ void add(uint32_t bin, unsigned long long amount)
    {
        unsigned int left = __ballot_sync(kAllLanes, amount != 0);
        while (left != 0U)
        {
            int const leader = __ffs(static_cast<int>(left)) - 1;
            uint32_t const theirs = __shfl_sync(kAllLanes, bin, leader);
            bool const same = amount != 0 && bin == theirs;
            unsigned int const crowd = __ballot_sync(kAllLanes, same);
            if (__popc(crowd) < kCrowd)
            {
                break;
            }
            unsigned long long const sum = warpSum(same ? amount : 0);
            if (static_cast<int>(threadIdx.x % kWarp) == leader)
            {
                addOne(bin, sum);
            }
            amount = same ? 0 : amount;
            left &= ~crowd;
        }
        if (amount != 0)
        {
            addOne(bin, amount);
        }
    }

    __device__ unsigned long long at(int bin) const
    {
        return static_cast<unsigned long long>(high[bin]) << 32U | low[bin];
    }

    uint32_t low[size];
    uint32_t high[size];

private:
    __device__ void addOne(uint32_t bin, unsigned long long amount)
    {
        auto const part = static_cast<uint32_t>(amount);
        uint32_t const before = atomicAdd(&low[bin], part);
        uint32_t const rest
            = static_cast<uint32_t>(amount >> 32U) + (before + part < before ? 1U : 0U);
        if (rest != 0U)
        {
            atomicAdd(&high[bin], rest);
        }
    }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    peakKernel(T const* logits, int64_t seq, Tiling tiling, Work work)
{
    __shared__ Extremes shared[kWarp];
    Row<T> const row(logits, seq, tiling.vocab);
    RowWork& mine = work.row();
    for (uint32_t bin = blockIdx.y * kThreads + threadIdx.x; bin < kBins;
         bin += gridDim.y * kThreads)
    {
        mine.bins[bin] = 0;
    }
    uint32_t const first = blockIdx.y * tiling.tilePacks;
    float best = -INFINITY;
    float least = INFINITY;
    float test = 0.0F; // NaN once a logit is not finite
    uint32_t token = 0;
    for (uint32_t i = threadIdx.x; i < tiling.tilePacks; i += kThreads)
    {
        Pack const pack = row.load(first + i);
        for (int k = 0; k < kPack; ++k)
        {
            if ((pack.valid >> k & 1U) != 0U)
            {
                float const logit = pack.logits[k];
                test = fmaf(logit, 0.0F, test);
                least = fminf(least, logit);
                token = logit > best ? (first + i) * kPack + k - row.begin : token;
                best = logit > best ? logit : best;
            }
        }
    }
    uint64_t const found = static_cast<uint64_t>(keyOf(best)) << 32U | (0xFFFFFFFFU - token);
    Extremes const all = warpExtremes({test == 0.0F ? found : kNotFinite, least});
    if (threadIdx.x % kWarp == 0)
    {
        shared[threadIdx.x / kWarp] = all;
    }
    __syncthreads();
    if (threadIdx.x < kWarp)
    {
        bool const filled = threadIdx.x < kThreads / kWarp;
        Extremes const tile
            = warpExtremes(filled ? shared[threadIdx.x] : Extremes{0, INFINITY});
        if (threadIdx.x == 0)
        {
            mine.extremes[blockIdx.y] = tile;
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) binsKernel(
    T const* logits, int64_t seq, Tiling tiling, Work work, float halvings, bool counting)
{
    __shared__ Histogram<kBins> shared;
    RowWork& mine = work.row();
    Extremes const extremes = rowExtremes(mine, tiling.tiles);
    if (extremes.best == kNotFinite)
    {
        return;
    }
    shared.template clear<kThreads>();
    __syncthreads();
    Row<T> const row(logits, seq, tiling.vocab);
    Scale const scale(extremes, halvings);
    uint32_t const first = blockIdx.y * tiling.tilePacks;
    for (uint32_t i = threadIdx.x; i < tiling.tilePacks; i += kThreads)
    {
        Pack const pack = row.load(first + i);
        for (int k = 0; k < kPack; ++k)
        {
            float const octaves = scale.octaves(pack.logits[k]);
            bool const in = (pack.valid >> k & 1U) != 0U && octaves < kOctaves;
            if (!counting)
            {
                shared.add(scale.bin(octaves), in ? scale.weight(pack.logits[k]) : 0);
            }
            else if (in)
            {
                atomicAdd(&shared.low[scale.bin(octaves)], 1U); // the hardware sums equal lanes
            }
        }
    }
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads)
    {
        unsigned long long const amount = shared.at(bin);
        if (amount != 0)
        {
            atomicAdd(&mine.bins[bin], amount);
        }
    }
}

// The bin that has the border, from what all bins hold. For every thread of the block.
__device__ Border findBorder(
    RowWork const& work, SamplingRule const& rule, bool counting, Border& shared)
{
    __shared__ unsigned long long sums[kWarp];
    constexpr int kEach = kBins / kThreads;
    unsigned long long bins[kEach];
    unsigned long long mine = 0;
    for (int i = 0; i < kEach; ++i)
    {
        bins[i] = work.bins[threadIdx.x * kEach + i];
        mine += bins[i];
    }
    if (threadIdx.x == 0)
    {
        // Fewer than k weigh anything: all of them are kept.
        shared = {0, kBins - 1, static_cast<uint64_t>(rule.topK)};
    }
    unsigned long long total = 0;
    unsigned long long before = blockPrefix<kThreads>(mine, sums, total);
    uint64_t const wanted
        = counting ? static_cast<uint64_t>(rule.topK) : wantedOf(rule.topP, total);
    for (int i = 0; i < kEach; ++i)
    {
        if (before < wanted && before + bins[i] >= wanted)
        {
            uint32_t const bin = threadIdx.x * kEach + i;
            // Top-k's tokens are all marked: top-p looks at them again.
            shared = counting ? Border{0, bin, wanted} : Border{bin, bin, wanted - before};
        }
        before += bins[i];
    }
    __syncthreads();
    return shared;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) borderKernel(T const* logits, int64_t seq,
    Tiling tiling, Work work, SamplingRule rule, float halvings, bool binned, bool counting)
{
    __shared__ Border found;
    __shared__ unsigned long long sums[kWarp];
    __shared__ Marked marked[kWarp];
    RowWork& mine = work.row();
    Extremes const extremes = rowExtremes(mine, tiling.tiles);
    if (extremes.best == kNotFinite)
    {
        return;
    }
    Row<T> const row(logits, seq, tiling.vocab);
    Scale const scale(extremes, halvings);
    Border const border
        = binned ? findBorder(mine, rule, counting, found) : Border{kBins, kBins, 0};
    uint32_t const first = blockIdx.y * tiling.tilePacks;
    unsigned long long sum = 0;
    Marked between{0, 0, 0};
    for (uint32_t i = threadIdx.x; i < tiling.tilePacks; i += kThreads)
    {
        Pack const pack = row.load(first + i);
        uint32_t marks = 0;
        for (int k = 0; k < kPack; ++k)
        {
            float const octaves = scale.octaves(pack.logits[k]);
            if ((pack.valid >> k & 1U) != 0U && octaves < kOctaves)
            {
                uint32_t const bin = scale.bin(octaves);
                if (bin < border.sure)
                {
                    sum += scale.weight(pack.logits[k]);
                }
                else if (bin <= border.last)
                {
                    marks |= 1U << k;
                    uint32_t const key = keyOf(pack.logits[k]);
                    between = join(between, {scale.weight(pack.logits[k]), key, ~key});
                }
            }
        }
        if (binned && first + i < tiling.packs)
        {
            work.marks()[first + i] = static_cast<unsigned char>(marks);
        }
    }
    sum = warpSum(sum);
    between = warpMarked(between);
    if (threadIdx.x % kWarp == 0)
    {
        sums[threadIdx.x / kWarp] = sum;
        marked[threadIdx.x / kWarp] = between;
    }
    __syncthreads();
    if (threadIdx.x < kWarp)
    {
        bool const filled = threadIdx.x < kThreads / kWarp;
        sum = warpSum(filled ? sums[threadIdx.x] : 0);
        between = warpMarked(filled ? marked[threadIdx.x] : Marked{0, 0, 0});
        if (threadIdx.x == 0)
        {
            mine.sums[blockIdx.y] = sum;
            mine.marked[blockIdx.y] = between;
        }
        if (threadIdx.x == 0 && blockIdx.y == 0)
        {
            mine.border = border;
        }
    }
}

// The last kernel's block. Each function is called by all threads, ends with what it wrote in
// shared memory visible to all, and returns the same in each.
template <typename T>
class Choice
{
public:
    struct Shared
    {
        Histogram<kDigits> histogram;
        uint32_t keys[kListed];
        uint32_t places[kListed];
        unsigned long long sums[kWarp];
        uint32_t counts[kWarp];
        unsigned long long left;
        uint32_t found;
    };

    __device__ Choice(Row<T> const& row, Tiling const& tiling, Scale const& scale,
        RowWork const& work, unsigned char const* marks, Shared& shared)
        : mRow(row)
        , mTiling(tiling)
        , mScale(scale)
        , mWork(work)
        , mBorder(work.border)
        , mMarked(rowMarked(work, tiling.tiles))
        , mMarks(marks)
        , mShared(shared)
    {
        mDiffering = kWarp - __clz(static_cast<int>(mMarked.ones & mMarked.zeros));
    }

    // The least key that is kept.
    __device__ uint32_t leastKept(SamplingRule const& rule, bool counting)
    {
        if (mDiffering == 0)
        {
            return mMarked.ones; // equal logits share their fate
        }
        list();
        uint32_t least = 0;
        if (counting)
        {
            uint64_t const wanted = mBorder.wanted < mCount ? mBorder.wanted : mCount;
            least = leastWith(wanted, [](uint32_t) -> unsigned long long { return 1; });
        }
        if (rule.topP < 1.0F)
        {
            auto const kept = [this, least](uint32_t key) -> unsigned long long {
                return key >= least ? mScale.weight(valueOf(key)) : 0;
            };
            uint64_t const wanted
                = counting ? wantedOf(rule.topP, massOf(kept)) : mBorder.wanted;
            least = leastWith(wanted, kept);
        }
        return least;
    }

    // The token where the draw falls, in the order of tokens.
    __device__ uint32_t pick(uint32_t least, double draw, bool binned)
    {
        mShared.histogram.template clear<kChooseThreads>();
        __syncthreads();
        bool const some = binned && mDiffering != 0; // of the marked ones, not all
        if (some)
        {
            each([&](bool in, uint32_t key, uint32_t place) {
                bool const kept = in && key >= least;
                uint32_t const tile = place / kPack / mTiling.tilePacks;
                mShared.histogram.add(
                    kept ? tile : 0, kept ? mScale.weight(valueOf(key)) : 0);
            });
            __syncthreads();
        }
        unsigned long long const mine = threadIdx.x < mTiling.tiles
            ? mWork.sums[threadIdx.x]
                + (some ? mShared.histogram.at(threadIdx.x) : mWork.marked[threadIdx.x].mass)
            : 0;
        unsigned long long total = 0;
        unsigned long long before = blockPrefix<kChooseThreads>(mine, mShared.sums, total);
        uint64_t const target = targetOf(draw, total);
        if (before <= target && target - before < mine)
        {
            mShared.found = threadIdx.x;
            mShared.left = target - before;
        }
        __syncthreads();
        uint32_t const tile = mShared.found;
        unsigned long long const left = mShared.left;

        uint32_t const share = (mTiling.tilePacks + kChooseThreads - 1) / kChooseThreads;
        uint32_t const last = (tile + 1) * mTiling.tilePacks;
        uint32_t const from = tile * mTiling.tilePacks + threadIdx.x * share;
        uint32_t const to = from + share < last ? from + share : last;
        unsigned long long sum = 0;
        for (uint32_t i = from; i < to; ++i)
        {
            Pack const pack = mRow.load(i);
            for (int k = 0; k < kPack; ++k)
            {
                sum += kept(pack, k, least);
            }
        }
        before = blockPrefix<kChooseThreads>(sum, mShared.sums, total);
        if (before <= left && left - before < sum)
        {
            mShared.found = walk(from, to, least, left - before);
        }
        __syncthreads();
        return mShared.found;
    }

private:
    // The marked tokens, in order, to shared memory if they fit.
    __device__ void list()
    {
        uint32_t const words = mTiling.packs / 4;
        uint32_t const share = (words + kChooseThreads - 1) / kChooseThreads;
        uint32_t const from = threadIdx.x * share;
        uint32_t const to = from + share < words ? from + share : words;
        auto const* const marks = reinterpret_cast<uint32_t const*>(mMarks);
        uint32_t mine = 0;
        for (uint32_t i = from; i < to; ++i)
        {
            mine += __popc(marks[i]);
        }
        uint32_t at = blockPrefix<kChooseThreads>(mine, mShared.counts, mCount);
        if (mCount > kListed)
        {
            return;
        }
        for (uint32_t i = from; mine != 0U && i < to; ++i)
        {
            for (uint32_t bits = marks[i]; bits != 0U; bits &= bits - 1U)
            {
                mShared.places[at] = i * kWarp + __ffs(static_cast<int>(bits)) - 1;
                ++at;
            }
        }
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < mCount; i += kChooseThreads)
        {
            mShared.keys[i] = keyOf(mRow.at(mShared.places[i]));
        }
        __syncthreads();
    }

    // Visits the marked tokens, whole warps at a time: not `in` where a lane has none.
    template <typename Visit>
    __device__ void each(Visit visit)
    {
        if (mCount <= kListed)
        {
            for (uint32_t i = threadIdx.x; i - threadIdx.x % kWarp < mCount; i += kChooseThreads)
            {
                bool const in = i < mCount;
                visit(in, in ? mShared.keys[i] : 0U, in ? mShared.places[i] : 0U);
            }
            return;
        }
        uint32_t const packs = mTiling.tiles * mTiling.tilePacks; // a multiple of kWarp
        for (uint32_t i = threadIdx.x; i < packs; i += kChooseThreads)
        {
            uint32_t const marks = i < mTiling.packs ? mMarks[i] : 0U;
            if (__ballot_sync(kAllLanes, marks != 0U) == 0U)
            {
                continue;
            }
            Pack pack = mRow.load(i);
#pragma unroll 1 // eight copies of `visit` would make most of the kernel
            for (int k = 0; k < kPack; ++k)
            {
                visit((marks >> k & 1U) != 0U, keyOf(pack.next()), i * kPack + k);
            }
        }
    }

    template <typename Amount>
    __device__ unsigned long long massOf(Amount amount)
    {
        unsigned long long mine = 0;
        each([&](bool in, uint32_t key, uint32_t) { mine += in ? amount(key) : 0; });
        unsigned long long total = 0;
        blockPrefix<kChooseThreads>(mine, mShared.sums, total);
        __syncthreads();
        return total;
    }

    // The largest key such that the marked tokens of at least that key amount to `wanted`.
    template <typename Amount>
    __device__ uint32_t leastWith(unsigned long long wanted, Amount amount)
    {
        int bits = mDiffering;
        uint32_t prefix = bits < kWarp ? mMarked.ones >> bits << bits : 0U;
        while (bits > 0)
        {
            int const width = bits < kDigitBits ? bits : kDigitBits;
            bits -= width;
            mShared.histogram.template clear<kChooseThreads>();
            __syncthreads();
            each([&](bool in, uint32_t key, uint32_t) {
                uint32_t const digit = (key ^ prefix) >> bits;
                bool const counts = in && digit >> width == 0U;
                mShared.histogram.add(counts ? digit : 0U, counts ? amount(key) : 0);
            });
            __syncthreads();
            if (threadIdx.x < kWarp)
            {
                findDigit(wanted);
            }
            __syncthreads();
            prefix |= mShared.found << bits;
            wanted = mShared.left;
        }
        return prefix;
    }

    // By one warp: the largest digit such that what it and the larger ones hold is `wanted`.
    __device__ void findDigit(unsigned long long wanted)
    {
        constexpr int kEach = kDigits / kWarp;
        int const from = kDigits - 1 - static_cast<int>(threadIdx.x) * kEach;
        unsigned long long mine = 0;
        for (int i = 0; i < kEach; ++i)
        {
            mine += mShared.histogram.at(from - i);
        }
        unsigned long long before = warpPrefix(mine) - mine;
        for (int i = 0; i < kEach; ++i)
        {
            unsigned long long const here = mShared.histogram.at(from - i);
            if (before < wanted && before + here >= wanted)
            {
                mShared.found = static_cast<uint32_t>(from - i);
                mShared.left = wanted - before;
            }
            before += here;
        }
    }

    __device__ unsigned long long kept(Pack const& pack, int k, uint32_t least) const
    {
        bool const in = (pack.valid >> k & 1U) != 0U && keyOf(pack.logits[k]) >= least;
        return in ? mScale.weight(pack.logits[k]) : 0;
    }

    __device__ uint32_t walk(
        uint32_t from, uint32_t to, uint32_t least, unsigned long long left) const
    {
        for (uint32_t i = from; i < to; ++i)
        {
            Pack const pack = mRow.load(i);
            for (int k = 0; k < kPack; ++k)
            {
                unsigned long long const weight = kept(pack, k, least);
                if (left < weight)
                {
                    return i * kPack + k - mRow.begin;
                }
                left -= weight;
            }
        }
        return 0; // not reached: `left` lies in the sum
    }

    Row<T> mRow;
    Tiling mTiling;
    Scale mScale;
    RowWork const& mWork;
    Border mBorder;
    Marked mMarked;
    unsigned char const* mMarks;
    Shared& mShared;
    int mDiffering{0};  // in the last so many bits the keys of marked tokens differ
    uint32_t mCount{0}; // of the marked tokens
};

template <typename T>
__global__ void __launch_bounds__(kChooseThreads) chooseKernel(T const* logits, int64_t seq,
    Tiling tiling, Work work, SamplingRule rule, float halvings, bool binned, bool counting,
    uint64_t* draws, int64_t* ids, int64_t* chosen)
{
    __shared__ typename Choice<T>::Shared shared;
    RowWork const& mine = work.row();
    Extremes const extremes = rowExtremes(mine, tiling.tiles);
    uint64_t const number = draws[blockIdx.x];
    int64_t token = -1;
    if (extremes.best != kNotFinite)
    {
        token = static_cast<int64_t>(0xFFFFFFFFULL - (extremes.best & 0xFFFFFFFFULL));
        if (rule.temperature > 0.0F)
        {
            Row<T> const row(logits, seq, tiling.vocab);
            Choice<T> choice(
                row, tiling, Scale(extremes, halvings), mine, work.marks(), shared);
            uint32_t const least = binned ? choice.leastKept(rule, counting) : 0U;
            token = choice.pick(least, uniform(rule.seed, blockIdx.x, number), binned);
        }
    }
    __syncthreads(); // all have read the number
    if (threadIdx.x == 0)
    {
        draws[blockIdx.x] = number + 1;
        chosen[blockIdx.x] = token;
        ids[blockIdx.x] = token < 0 ? 0 : token; // an index out of range must not reach the model
    }
}

template <typename T>
cudaError_t chooseFrom(T const* logits, int64_t batch, int64_t seq, int64_t vocab,
    SamplingRule const& rule, uint64_t* draws, int64_t* ids, int64_t* chosen, void* workspace,
    cudaStream_t stream)
{
    Tiling const tiling = tilingOf(batch, vocab);
    Work const work{static_cast<unsigned char*>(workspace), rowWorkBytes(tiling.packs)};
    bool const greedy = rule.temperature <= 0.0F;
    bool const counting = !greedy && rule.topK > 0 && rule.topK < vocab;
    bool const binned = counting || (!greedy && rule.topP < 1.0F);
    float const halvings = greedy ? 0.0F : scaleOf(rule.temperature);
    auto const rows = static_cast<unsigned int>(batch);
    dim3 const tiles(rows, tiling.tiles);
    cudaError_t status
        = launch(peakKernel<T>, tiles, kThreads, stream, logits, seq, tiling, work);
    if (status == cudaSuccess && binned)
    {
        status = launch(binsKernel<T>, tiles, kThreads, stream, logits, seq, tiling, work, halvings,
            counting);
    }
    if (status == cudaSuccess && !greedy)
    {
        status = launch(borderKernel<T>, tiles, kThreads, stream, logits, seq, tiling, work, rule,
            halvings, binned, counting);
    }
    if (status == cudaSuccess)
    {
        status = launch(chooseKernel<T>, dim3(rows), kChooseThreads, stream, logits, seq, tiling,
            work, rule, halvings, binned, counting, draws, ids, chosen);
    }
    return status;
}

} // namespace

int64_t chooseBytes(int64_t batch, int64_t vocab)
{
    return batch * static_cast<int64_t>(rowWorkBytes(tilingOf(batch, vocab).packs));
}

cudaError_t launchChoose(LogitType type, void const* logits, int64_t batch, int64_t seq,
    int64_t vocab, SamplingRule const& rule, uint64_t* draws, int64_t* ids, int64_t* chosen,
    void* workspace, cudaStream_t stream)
{
    auto const from = [&](auto const* typed) {
        return chooseFrom(
            typed, batch, seq, vocab, rule, draws, ids, chosen, workspace, stream);
    };
    switch (type)
    {
    case LogitType::kHalf:
        return from(static_cast<__half const*>(logits));
    case LogitType::kBFloat16:
        return from(static_cast<__nv_bfloat16 const*>(logits));
    default:
        return from(static_cast<float const*>(logits));
    }
}

} // namespace iq
