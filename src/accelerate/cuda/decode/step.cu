// The small kernels of a decode step, between the matmuls. One row of the batch a block
// row; lengths, positions and tokens are on the device, so a captured graph of the step can be
// replayed as they grow.
//
// Configuration: one of EMBED, HEADS, SHRINK; PAGE: 0, or the cache of a row is paged, PAGE
// tokens a page; OVERLAP: overlap.cuh; NORMED (SHRINK): x is the stream times a norm's weight, still to be
// multiplied by 1 / rms from the sums of squares of every 16 elements.
// On an H100: EMBED 3.4 us, HEADS 3.7 us for one row and 3.9 for 32, SHRINK 3.7 us; 30 to 38 registers.

struct Parameters {
    u64 width;               // EMBED: hidden size; SHRINK: width of the input
    u64 heads, kv_heads;     // HEADS
    u64 cache_batch, cache_head, cache_row;  // strides of the cache, in elements; paged: of a page
    u64 epsilon;             // f32 bits
    u64 table_width;         // pages of a table
#if SHRINK
    AdapterPlace adapter;
#endif
};

#if EMBED
// x[row] = table[token[row]]
extern "C" __global__ void __launch_bounds__(256)
ENTRY(const u16* table, const int* token, u16* x, const __grid_constant__ Parameters p) {
    let_next_begin();
    wait_for_last();
    const uint4* from = (const uint4*)(table + (u64)token[blockIdx.x] * p.width);
    uint4* to = (uint4*)(x + (u64)blockIdx.x * p.width);
    for (int i = threadIdx.x; i < (int)(p.width / 8); i += 256) to[i] = from[i];
}
#endif

#if HEADS
// Normalises and rotates (RoPE) the new queries and keys, and writes keys and values into the cache as the last of
// its `end[row]` tokens. qkv [rows, (heads + 2 kv_heads) * HEAD_DIM]; one warp a head.
#define HALF (HEAD_DIM / 2)
extern "C" __global__ void __launch_bounds__(128)
ENTRY(const u16* qkv, const u16* q_norm, const u16* k_norm, const float* frequencies, const int* position,
      const int* end,
#if PAGE
      const int* table, const int* pages,
#endif
      u16* queries, u16* keys, u16* values, const __grid_constant__ Parameters p) {
    let_next_begin();
    wait_for_last();
    const int lane = threadIdx.x & 31;
    const int head = blockIdx.x * 4 + (threadIdx.x >> 5), row = blockIdx.y;
    const int heads = (int)p.heads, kv_heads = (int)p.kv_heads;
    if (head >= heads + 2 * kv_heads) return;
    const u16* from = qkv + ((u64)row * (heads + 2 * kv_heads) + head) * HEAD_DIM;
    const int token = end[row] - 1;
#if PAGE
    const u64 page = pages[(u64)table[row] * p.table_width + token / PAGE];
    const u64 slot = page * p.cache_batch + (u64)(token % PAGE) * p.cache_row;
#else
    const u64 slot = row * p.cache_batch + (u64)token * p.cache_row;
#endif
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

#if SHRINK
// low[row][share] = x[row] A^T for each matmul of one input: grid (4, matmuls, rows), a warp a rank.
extern "C" __global__ void __launch_bounds__(256)
ENTRY(const u16* x, const AdapterMatrix* adapters, const int* adapter_of,
#if NORMED
      const float* squares,
#endif
      float* low, const __grid_constant__ Parameters p) {
    let_next_begin();
    wait_for_last();
    const int row = blockIdx.z, share = blockIdx.y, lane = threadIdx.x & 31, k_end = (int)p.width;
    if (adapter_of[row] < 0) return;
    const AdapterMatrix m = adapters[(u64)adapter_of[row] * p.adapter.matrices + p.adapter.first + share];
    const u16* from = x + (u64)row * p.width;
    float factor = 1.f;
#if NORMED
    float sum_of_squares = 0.f;
    for (int i = lane; i < k_end / 16; i += 32) sum_of_squares += squares[(u64)row * (k_end / 16) + i];
    factor = rsqrtf(warp_sum(sum_of_squares) / k_end + __uint_as_float((u32)p.epsilon));
#endif
    for (int r = blockIdx.x * 8 + (threadIdx.x >> 5); r < m.rank; r += 32) {
        const u16* a = m.a + (u64)r * p.width;
        float sum = 0.f;
        for (int k = lane * 8; k < k_end; k += 256) {
            float left[8], right[8];
            load_vector(from + k, left);
            load_vector(a + k, right);
#pragma unroll
            for (int i = 0; i < 8; i++) sum += left[i] * right[i];
        }
        sum = warp_sum(sum);
        if (lane == 0) low[((u64)row * ADAPTER_SHARES + share) * ADAPTER_RANK + r] = sum * factor;
    }
}
#endif
