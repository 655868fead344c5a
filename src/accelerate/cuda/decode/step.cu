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
//
// CACHE_INT8: the cache is quantised: a level plus 128 in a byte, and a scale f32 a row, one for each HEAD_DIM bytes.
#define HALF (HEAD_DIM / 2)
#define OWN ((HEAD_DIM + 31) / 32)  // elements of a lane

#if CACHE_INT8
typedef unsigned char cached;
// Elements lane + 32 j of a row, rounded to bf16 as an unquantised cache holds them.
__device__ __forceinline__ void store_row(cached* cache, float* scales, u64 at, const float (&row)[OWN]) {
    const int lane = threadIdx.x & 31;
    float largest = 0.f;
#pragma unroll
    for (int j = 0; j < OWN; j++)
        if (lane + 32 * j < HEAD_DIM) largest = fmaxf(largest, fabsf(row[j]));
    const float scale = warp_max(largest) / 127.f;
    const float divisor = fmaxf(scale, 1.17549435e-38f);
#pragma unroll
    for (int j = 0; j < OWN; j++)
        if (lane + 32 * j < HEAD_DIM)
            cache[at + lane + 32 * j] = (cached)(int)(fminf(fmaxf(rintf(row[j] / divisor), -127.f), 127.f) + 128.f);
    if (lane == 0) scales[at / HEAD_DIM] = scale;
}
#else
typedef u16 cached;
#endif
extern "C" __global__ void __launch_bounds__(128)
ENTRY(const u16* qkv, const u16* q_norm, const u16* k_norm, const float* frequencies, const int* position,
      const int* end,
#if PAGE
      const int* table, const int* pages,
#endif
      u16* queries, cached* keys, cached* values,
#if CACHE_INT8
      float* key_scales, float* value_scales,
#endif
      const __grid_constant__ Parameters p) {
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
        const u64 at = slot + (u64)(head - heads - kv_heads) * p.cache_head;
#if CACHE_INT8
        float row[OWN];
#pragma unroll
        for (int j = 0; j < OWN; j++) row[j] = lane + 32 * j < HEAD_DIM ? bf16_to_float(from[lane + 32 * j]) : 0.f;
        store_row(values, value_scales, at, row);
#else
        for (int i = lane; i < HEAD_DIM; i += 32) values[at + i] = from[i];
#endif
        return;
    }
    const bool is_query = head < heads;
    const u16* weight = is_query ? q_norm : k_norm;
    const u64 at = slot + (u64)(head - heads) * p.cache_head;
#if CACHE_INT8
    // A key is gathered in shared memory: a lane's elements are not those that it rotates.
    __shared__ float rows[4][HEAD_DIM];
    float* rotated_row = rows[threadIdx.x >> 5];
#endif
    u16* to = is_query ? queries + ((u64)row * heads + head) * HEAD_DIM : (u16*)keys + at;
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
        const float first = a * cosine - b * sine, second = b * cosine + a * sine;
#if CACHE_INT8
        if (!is_query) {
            rotated_row[i] = rounded(first);
            rotated_row[i + HALF] = rounded(second);
            continue;
        }
#endif
        to[i] = (u16)pack_bf16(first, 0.f);
        to[i + HALF] = (u16)pack_bf16(second, 0.f);
    }
#if CACHE_INT8
    if (is_query) return;
    __syncwarp();
    float own[OWN];
#pragma unroll
    for (int j = 0; j < OWN; j++) own[j] = lane + 32 * j < HEAD_DIM ? rotated_row[lane + 32 * j] : 0.f;
    store_row(keys, key_scales, at, own);
#endif
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
