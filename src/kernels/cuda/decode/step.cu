// The small kernels of a decode step: what lies between the products. One row of the batch a block
// row; lengths, positions and tokens live on the device, so a captured graph of the step can be
// replayed as they grow.
//
// Configuration: one of EMBED, HEADS, PICK, ADVANCE. Limit: launch.

struct Parameters {
    u64 width;            // EMBED: hidden size; PICK, ADVANCE: vocabulary
    u64 heads, kv_heads;  // HEADS
    u64 cache_batch, cache_head, cache_row;  // strides of the cache, in elements
    u64 epsilon;          // f32 bits
    u64 slots;            // ADVANCE: steps the ring holds
};

#if EMBED
// x[row] = table[token[row]]
extern "C" __global__ void __launch_bounds__(256)
ENTRY(const u16* table, const int* token, u16* x, const __grid_constant__ Parameters p) {
    const uint4* from = (const uint4*)(table + (u64)token[blockIdx.x] * p.width);
    uint4* to = (uint4*)(x + (u64)blockIdx.x * p.width);
    for (int i = threadIdx.x; i < (int)(p.width / 8); i += 256) to[i] = from[i];
}
#endif

#if HEADS
// Normalises and turns the new queries and keys, and puts keys and values into the cache as the last of
// its `end[row]` tokens. qkv [rows, (heads + 2 kv_heads) * HEAD_DIM]; one warp a head.
#define HALF (HEAD_DIM / 2)
extern "C" __global__ void __launch_bounds__(128)
ENTRY(const u16* qkv, const u16* q_norm, const u16* k_norm, const float* frequencies, const int* position,
      const int* end, u16* queries, u16* keys, u16* values, const __grid_constant__ Parameters p) {
    const int lane = threadIdx.x & 31;
    const int head = blockIdx.x * 4 + (threadIdx.x >> 5), row = blockIdx.y;
    const int heads = (int)p.heads, kv_heads = (int)p.kv_heads;
    if (head >= heads + 2 * kv_heads) return;
    const u16* from = qkv + ((u64)row * (heads + 2 * kv_heads) + head) * HEAD_DIM;
    const u64 slot = row * p.cache_batch + (u64)(end[row] - 1) * p.cache_row;
    if (head >= heads + kv_heads) {
        u16* to = values + slot + (u64)(head - heads - kv_heads) * p.cache_head;
        for (int i = lane; i < HEAD_DIM; i += 32) to[i] = from[i];
        return;
    }
    const bool is_query = head < heads;
    const u16* weight = is_query ? q_norm : k_norm;
    u16* to = is_query ? queries + ((u64)row * heads + head) * HEAD_DIM
                       : keys + slot + (u64)(head - heads) * p.cache_head;
    float squares = 0.f;
    for (int i = lane; i < HEAD_DIM; i += 32) {
        const float value = bf16_to_float(from[i]);
        squares += value * value;
    }
    const float scale = rsqrtf(warp_sum(squares) / HEAD_DIM + __uint_as_float((u32)p.epsilon));
    for (int i = lane; i < HALF; i += 32) {
        const float a = rounded(rounded(bf16_to_float(from[i]) * scale) * bf16_to_float(weight[i]));
        const float b = rounded(rounded(bf16_to_float(from[i + HALF]) * scale) * bf16_to_float(weight[i + HALF]));
        float sine, cosine;
        sincosf((float)position[row] * frequencies[i], &sine, &cosine);
        to[i] = (u16)pack_bf16(a * cosine - b * sine, 0.f);
        to[i + HALF] = (u16)pack_bf16(b * cosine + a * sine, 0.f);
    }
}
#endif

#if PICK || ADVANCE
struct Best {
    float value;
    int index;
};

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
#endif

#if PICK
// The likeliest token of a share of the vocabulary: grid (shares, rows). NaN never wins.
extern "C" __global__ void __launch_bounds__(256)
ENTRY(const float* logits, float* best_values, int* best_indices, const __grid_constant__ Parameters p) {
    __shared__ Best shared[8];
    const int vocab = (int)p.width;
    const float* row = logits + (u64)blockIdx.y * vocab;
    Best best = {-3.4e38f, 0x7fffffff};
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

#if ADVANCE
// Joins the shares of one row, makes the token the next input and hands it to the host: the ring
// lies in the host's memory. -1 stands for logits without a largest one (NaN).
extern "C" __global__ void __launch_bounds__(32)
ENTRY(const float* best_values, const int* best_indices, int* token, int* position, int* end, int* step,
      int* ring, const __grid_constant__ Parameters p) {
    const int row = blockIdx.x, rows = gridDim.x, shares = (int)p.width;
    Best best = {-3.4e38f, 0x7fffffff};
    for (int i = threadIdx.x; i < shares; i += 32)
        best = better(best, Best{best_values[row * shares + i], best_indices[row * shares + i]});
    best = warp_best(best);
    if (threadIdx.x != 0) return;
    const bool found = best.index != 0x7fffffff;
    token[row] = found ? best.index : 0;
    position[row] += 1;
    end[row] += 1;
    ring[(u64)(step[row] % (int)p.slots) * rows + row] = found ? best.index : -1;
    step[row] += 1;
}
#endif
