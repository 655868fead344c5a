// Sampling a token from logits on the device, as `Sampler` on the host does: repetition penalty, temperature,
// top-k, top-p, min-p in transformers' order, then a draw whose uniform number comes from the host.
//
// Each filter keeps a prefix of the tokens in order of falling logit (then rising id), so a
// filter is the cumulative weight of its prefix, and the draw is the token at a cumulative weight. No
// sort of the vocabulary: a histogram of distances to the largest logit gives all prefixes at once,
// and only the bin that holds a boundary is collected and sorted. Weights are integers (28 bits, 1 the
// likeliest), so that sums do not depend on their order and a seed gives one answer.
//
// Configuration: PICK, the likeliest token of a share of the vocabulary: grid (shares, rows), 256
// threads. CHOOSE: grid (rows), 1,024 threads; FEED: the token is the next step's input.
// Limit of CHOOSE: one processor reads a row (600 KB) three to six times; 30 to 60 us with filters,
// launch without.
// Source: Keskar et al. 2019 (repetition penalty), Fan, Lewis and Dauphin 2018 (top-k), Holtzman et al. 2020 (top-p), Nguyen
// et al. 2024 (min-p).
// On an H100: PICK 4.7 us (16 registers), CHOOSE without filters 4.4 us (54 registers, 37 KB of shared memory).

struct Parameters {
    u64 vocab, shares;
    u64 mask_words;  // of a row's tokens seen
    u64 slots;       // FEED: steps the ring holds
};

struct Best {
    float value;
    int index;
};

#define NONE 0x7fffffff

__device__ __forceinline__ Best better(Best a, Best b) {
    const bool take = b.value > a.value || (b.value == a.value && b.index < a.index);
    return take ? b : a;
}

__device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
    for (int distance = 16; distance > 0; distance >>= 1) {
        Best other;
        other.value = __shfl_xor_sync(~0u, best.value, distance);
        other.index = __shfl_xor_sync(~0u, best.index, distance);
        best = better(best, other);
    }
    return best;
}

#if PICK
// NaN is never the largest.
extern "C" __global__ void __launch_bounds__(256)
ENTRY(const float* logits, float* best_values, int* best_indices, const __grid_constant__ Parameters p) {
    __shared__ Best shared[8];
    let_next_begin();
    wait_for_last();
    const int vocab = (int)p.vocab;
    const float* row = logits + (u64)blockIdx.y * vocab;
    Best best = {-3.4e38f, NONE};
    for (int i = blockIdx.x * 256 + threadIdx.x; i < vocab; i += gridDim.x * 256)
        best = better(best, Best{row[i], i});
    best = warp_best(best);
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < 8; i++) best = better(best, shared[i]);
        best_values[blockIdx.y * gridDim.x + blockIdx.x] = best.value;
        best_indices[blockIdx.y * gridDim.x + blockIdx.x] = best.index;
    }
}
#endif

#if CHOOSE
#define THREADS 1024
#define BINS 2048
#define COLLECTED 1024
#define ONE 268435456.f  // weight of the likeliest token

struct Row {
    const float* logits;
    const u32* seen;  // null without a penalty
    int vocab;
    float penalty, temperature, top;
    float bins_per_unit;  // bins of the histogram a unit of distance
};

struct Shared {
    u32 count[BINS], high[BINS], low[BINS];  // a bin's weight is high * 2^14 + low
    u64 keys[COLLECTED];
    u32 weights[COLLECTED];
    u64 sums[32];
    Best best[32];
    int collected, found;
    u64 before;
};

__device__ __forceinline__ float4 read_four(const float* from) {
    float4 v;
    asm("ld.global.nc.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from));
    return v;
}

// Calls `take(id, logit)` for all tokens, penalised where they were seen. The vocabulary is a multiple of
// four; two reads are in flight at a time, since one processor reads a whole row.
template <class Take>
__device__ __forceinline__ void each(const Row& row, Take take) {
    const auto four = [&](int at, float4 v) {
        const float values[4] = {v.x, v.y, v.z, v.w};
        const u32 seen = row.seen ? row.seen[at >> 5] >> (at & 31) : 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float value = values[i];
            if (seen >> i & 1) value = value > 0.f ? value / row.penalty : value * row.penalty;
            take(at + i, value);
        }
    };
    for (int at = threadIdx.x * 4; at < row.vocab; at += THREADS * 8) {
        const int next = at + THREADS * 4;
        const float4 first = read_four(row.logits + at), second = read_four(row.logits + min(next, row.vocab - 4));
        four(at, first);
        if (next < row.vocab) four(next, second);
    }
}

__device__ __forceinline__ float weight_of(const Row& row, float distance) { return expf(-distance / row.temperature); }
__device__ __forceinline__ u32 fixed(float weight) { return (u32)(weight * ONE + 0.5f); }

__device__ Best block_best(Best best, Shared& shared) {
    best = warp_best(best);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) shared.best[threadIdx.x >> 5] = best;
    __syncthreads();
    return warp_best(shared.best[threadIdx.x & 31]);
}

__device__ u64 block_sum(u64 value, Shared& shared) {
#pragma unroll
    for (int distance = 16; distance > 0; distance >>= 1) value += __shfl_xor_sync(~0u, value, distance);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) shared.sums[threadIdx.x >> 5] = value;
    __syncthreads();
    value = shared.sums[threadIdx.x & 31];
#pragma unroll
    for (int distance = 16; distance > 0; distance >>= 1) value += __shfl_xor_sync(~0u, value, distance);
    return value;
}

// The first place whose running sum exceeds `target`, in shared.found, and the sum before it, in
// shared.before; the last place if none does. One warp works; all threads call.
template <class Value>
__device__ void find(Value value, int count, u64 target, Shared& shared) {
    __syncthreads();
    if (threadIdx.x < 32) {
        const int share = (count + 31) / 32, from = min((int)threadIdx.x * share, count), to = min(from + share, count);
        u64 own = 0;
        for (int i = from; i < to; i++) own += value(i);
        u64 through = own;
#pragma unroll
        for (int distance = 1; distance < 32; distance <<= 1) {
            const u64 other = __shfl_up_sync(~0u, through, distance);
            if (threadIdx.x >= distance) through += other;
        }
        const u32 past = __ballot_sync(~0u, through > target);
        const int owner = past ? __ffs(past) - 1 : 31;
        if (threadIdx.x == owner) {
            u64 before = through - own;
            int i = past ? from : count - 1;
            if (!past) before = through - (count > 0 ? value(count - 1) : 0);
            while (past && i < to - 1 && before + value(i) <= target) before += value(i++);
            shared.found = i;
            shared.before = before;
        }
    }
    __syncthreads();
}

// Sorts the collected keys; the rest of the next power of two is filled with the largest key.
__device__ void sort_collected(Shared& shared) {
    int size = 2;
    while (size < shared.collected) size *= 2;
    for (int i = shared.collected + threadIdx.x; i < size; i += THREADS) shared.keys[i] = ~0ull;
    for (int span = 2; span <= size; span *= 2) {
        for (int step = span / 2; step > 0; step /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < size; i += THREADS) {
                const int other = i ^ step;
                if (other > i) {
                    const u64 a = shared.keys[i], b = shared.keys[other];
                    if ((a > b) == ((i & span) == 0)) {
                        shared.keys[i] = b;
                        shared.keys[other] = a;
                    }
                }
            }
        }
    }
    __syncthreads();
}

struct Choice {
    int token;
    u64 through;  // weight of all tokens up to this one
};

// The token at a position in the order: the first whose cumulative weight (with `by_count`: count) exceeds
// `target`. The histogram is complete; it stays as it is.
__device__ __noinline__ Choice select(const Row& row, bool by_count, u64 target, Shared& shared) {
    const auto weight = [&](int bin) { return ((u64)shared.high[bin] << 14) + shared.low[bin]; };
    if (by_count) {
        find([&](int bin) { return (u64)shared.count[bin]; }, BINS, target, shared);
    } else {
        find(weight, BINS, target, shared);
    }
    const int bin = shared.found;
    u64 before = shared.before, before_weight = before;
    if (by_count) {
        u64 sum = 0;
        for (int i = threadIdx.x; i < bin; i += THREADS) sum += weight(i);
        before_weight = block_sum(sum, shared);
        // Past the last bin weights are zero: all remaining tokens are kept.
        if (bin == BINS - 1) return Choice{NONE, before_weight + weight(bin)};
    }
    __syncthreads();
    if (threadIdx.x == 0) shared.collected = 0;
    __syncthreads();
    // A bin that is too full is divided into parts. More than COLLECTED tokens in a part of one are a
    // model with nearly equal logits: the first of them represents all.
    const bool crowded = shared.count[bin] > COLLECTED;
    int part = -1;
    if (crowded) {
        // 64 parts; their sums use the memory of the keys.
        u32* counts = (u32*)shared.keys;
        u64* weights = shared.keys + 64;
        if (threadIdx.x < 64) {
            counts[threadIdx.x] = 0;
            weights[threadIdx.x] = 0;
        }
        __syncthreads();
        each(row, [&](int, float logit) {
            const float distance = row.top - logit, place = distance * row.bins_per_unit;
            if (!(place < (float)(bin + 1)) || place < (float)bin) return;
            const int to = min((int)((place - (float)bin) * 64.f), 63);
            atomicAdd(counts + to, 1u);
            atomicAdd(weights + to, (u64)fixed(weight_of(row, distance)));
        });
        const u64 within = target - before;
        if (by_count) {
            find([&](int i) { return (u64)counts[i]; }, 64, within, shared);
        } else {
            find([&](int i) { return weights[i]; }, 64, within, shared);
        }
        part = shared.found;
        before += shared.before;
        u64 sum = 0;
        if (threadIdx.x < part) sum = weights[threadIdx.x];
        before_weight += block_sum(sum, shared);
        __syncthreads();
    }
    each(row, [&](int i, float logit) {
        const float distance = row.top - logit, place = distance * row.bins_per_unit;
        if (!(place < (float)BINS) || (int)place != bin) return;
        if (crowded && min((int)((place - (float)bin) * 64.f), 63) != part) return;
        const int at = atomicAdd(&shared.collected, 1);
        if (at < COLLECTED) shared.keys[at] = (u64)__float_as_uint(distance) << 32 | (u32)i;
    });
    __syncthreads();
    const bool overflow = shared.collected > COLLECTED;
    __syncthreads();
    if (overflow) {
        if (threadIdx.x == 0) {
            shared.keys[0] = ~0ull;
            shared.collected = 1;
        }
        __syncthreads();
        each(row, [&](int i, float logit) {
            const float distance = row.top - logit, place = distance * row.bins_per_unit;
            if (!(place < (float)BINS) || (int)place != bin) return;
            if (min((int)((place - (float)bin) * 64.f), 63) != part) return;
            atomicMin(shared.keys, (u64)__float_as_uint(distance) << 32 | (u32)i);
        });
        __syncthreads();
    }
    sort_collected(shared);
    for (int i = threadIdx.x; i < shared.collected; i += THREADS)
        shared.weights[i] = fixed(weight_of(row, __uint_as_float((u32)(shared.keys[i] >> 32))));
    __syncthreads();
    if (by_count) {
        shared.found = min((int)(target - before), shared.collected - 1);
        __syncthreads();
    } else {
        find([&](int i) { return (u64)shared.weights[i]; }, shared.collected, target - before, shared);
    }
    const int place = shared.found;
    u64 sum = 0;
    for (int i = threadIdx.x; i <= place; i += THREADS) sum += shared.weights[i];
    const u64 through = before_weight + block_sum(sum, shared);
    const int token = (int)(u32)shared.keys[place];
    __syncthreads();
    return Choice{token, through};
}

// Fills the histogram and returns the weight of all tokens.
__device__ __noinline__ u64 fill(const Row& row, Shared& shared) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) shared.count[i] = shared.high[i] = shared.low[i] = 0;
    __syncthreads();
    u64 sum = 0;
    u32 beyond = 0;
    each(row, [&](int, float logit) {
        const float distance = row.top - logit, place = distance * row.bins_per_unit;
        if (!(place < (float)BINS)) {
            beyond++;
            return;
        }
        const u32 weight = fixed(weight_of(row, distance));
        atomicAdd(shared.count + (int)place, 1u);
        if (weight >> 14) atomicAdd(shared.high + (int)place, weight >> 14);
        if (weight & 0x3fff) atomicAdd(shared.low + (int)place, weight & 0x3fff);
        sum += weight;
    });
    atomicAdd(shared.count + BINS - 1, beyond);
    return block_sum(sum, shared);
}

// The control words are those of control.cuh; a row's own are CONTROL_ROWS apart. The tokens go to the
// host's memory; -1 means logits without a largest one (NaN).
extern "C" __global__ void __launch_bounds__(THREADS)
ENTRY(const float* logits, const float* best_values, const int* best_indices, u32* control, u32* seen,
#if FEED
      const float* uniforms,
#endif
      int* results, const __grid_constant__ Parameters p) {
    __shared__ Shared shared;
    wait_for_last();
    const int at = blockIdx.x, shares = (int)p.shares;
    const auto word = [&](int field) -> u32& { return control[field * CONTROL_ROWS + at]; };
    Row row = {logits + (u64)at * p.vocab, nullptr, (int)p.vocab, __uint_as_float(word(CONTROL_PENALTY)),
               __uint_as_float(word(CONTROL_TEMPERATURE)), 0.f, 0.f};
    Best best = {-3.4e38f, NONE};
    if (row.penalty == 1.f) {
        for (int i = threadIdx.x; i < shares; i += THREADS)
            best = better(best, Best{best_values[at * shares + i], best_indices[at * shares + i]});
    } else {
        u32* mask = seen + (u64)word(CONTROL_MASK) * p.mask_words;
        const u32 token = word(CONTROL_TOKEN);
        if (threadIdx.x == 0) mask[token >> 5] |= 1u << (token & 31);
        __syncthreads();
        row.seen = mask;
        each(row, [&](int i, float logit) { best = better(best, Best{logit, i}); });
    }
    best = block_best(best, shared);
    int token = best.index;
    if (row.temperature > 0.f && token != NONE) {
        row.top = best.value;
        // A token 20 temperatures below the likeliest has weight zero.
        row.bins_per_unit = BINS / (20.f * row.temperature);
        u64 all = fill(row, shared);
        const u32 top_k = word(CONTROL_TOP_K);
        if (top_k > 0 && top_k < row.vocab) all = select(row, true, top_k - 1, shared).through;
        const float top_p = __uint_as_float(word(CONTROL_TOP_P)), min_p = __uint_as_float(word(CONTROL_MIN_P));
        if (top_p < 1.f) {
            const u64 least = (u64)ceil((double)top_p * (double)all);
            all = select(row, false, max(least, 1ull) - 1, shared).through;
        }
        if (min_p > 0.f) {
            u64 sum = 0;
            each(row, [&](int, float logit) {
                const float weight = weight_of(row, row.top - logit);
                if (weight >= min_p) sum += fixed(weight);
            });
            sum = block_sum(sum, shared);
            all = min(all, sum);
        }
#if FEED
        const float uniform = uniforms[(u64)word(CONTROL_STEP) * gridDim.x + at];
#else
        const float uniform = __uint_as_float(word(CONTROL_UNIFORM));
#endif
        token = select(row, false, (u64)((double)uniform * (double)all), shared).token;
    }
    if (threadIdx.x != 0) return;
    const int result = token == NONE ? -1 : token;
#if FEED
    const u32 step = word(CONTROL_STEP);
    word(CONTROL_TOKEN) = (u32)max(result, 0);
    word(CONTROL_POSITION) += 1;
    word(CONTROL_END) += 1;
    word(CONTROL_STEP) = step + 1;
    results[(u64)(step % (u32)p.slots) * gridDim.x + at] = result;
#else
    results[at] = result;
#endif
}
#endif
