// New keys and values of one layer into the pages of their sequence, and after a prefix also all of
// them, the earlier ones included, into contiguous buffers: the attention of a prompt's next chunk reads these.
// One warp a row of a head, keys and values in one launch.
//
// new_keys, new_values [heads, rows, HEAD_DIM] with strides for head and row; table [pages of the
// sequence]; pool [pages, heads, PAGE, HEAD_DIM]; all_keys, all_values [heads, past + rows, HEAD_DIM],
// written where past > 0. HEAD_DIM is a multiple of 8. Limit: launch.
// Source: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention".
// On an H100: 3.2 us, 22 registers.

// CACHE_INT8: the pool is quantised: a level plus 128 in a byte, a scale f32 a row in pools of their own. All rows are then
// written to all_keys and all_values as the pool holds them, whatever `past` is.

struct Parameters {
    u64 heads, rows, past;
    u64 key_strides[2], value_strides[2];
    u64 keys, values;  // addresses of the layer's pools
#if CACHE_INT8
    u64 key_scales, value_scales;
#endif
};

extern "C" __global__ void __launch_bounds__(256)
ENTRY(const u16* new_keys, const u16* new_values, const int* table, u16* all_keys, u16* all_values,
      const __grid_constant__ Parameters p) {
    const u64 tokens = p.past + p.rows, a_kind = p.heads * tokens;
    const u64 item = (u64)blockIdx.x * 8 + (threadIdx.x >> 5);
    if (item >= 2 * a_kind) return;
    const bool is_key = item < a_kind;
    const u64 index = is_key ? item : item - a_kind;
    const u64 head = index / tokens, token = index % tokens;
    const u64 place = ((u64)table[token / PAGE] * p.heads + head) * PAGE + token % PAGE;
    uint4* all = (uint4*)((is_key ? all_keys : all_values) + (head * tokens + token) * HEAD_DIM);
    const u64* strides = is_key ? p.key_strides : p.value_strides;
    const bool is_new = token >= p.past;
    const uint4* fresh = (const uint4*)((is_key ? new_keys : new_values) + head * strides[0] + (token - p.past) * strides[1]);
#if CACHE_INT8
    // Eight elements a lane: HEAD_DIM is at most 256.
    const int lane = threadIdx.x & 31;
    const bool has = lane < HEAD_DIM / 8;
    uint2* held = (uint2*)((unsigned char*)(is_key ? p.keys : p.values) + place * HEAD_DIM) + lane;
    float* held_scale = (float*)(is_key ? p.key_scales : p.value_scales) + place;
    float scale;
    uint2 levels = make_uint2(0, 0);
    if (is_new) {
        float values[8];
        float largest = 0.f;
        if (has) {
            load_vector((const u16*)(fresh + lane), values);
#pragma unroll
            for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(values[i]));
        }
        scale = warp_max(largest) / 127.f;
        if (has) {
            const float divisor = fmaxf(scale, 1.17549435e-38f);
            u32 words[2] = {0, 0};
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float level = fminf(fmaxf(rintf(values[i] / divisor), -127.f), 127.f) + 128.f;
                words[i / 4] |= (u32)level << (8 * (i % 4));
            }
            levels = make_uint2(words[0], words[1]);
            *held = levels;
        }
        if (lane == 0) *held_scale = scale;
    } else {
        scale = *held_scale;
        if (has) levels = *held;
    }
    if (has) {
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; i++)
            values[i] = ((float)((i < 4 ? levels.x : levels.y) >> (8 * (i % 4)) & 255) - 128.f) * scale;
        store_vector((u16*)(all + lane), values);
    }
#else
    uint4* held = (uint4*)((u16*)(is_key ? p.keys : p.values) + place * HEAD_DIM);
    const uint4* from = is_new ? fresh : held;
    for (int i = threadIdx.x & 31; i < HEAD_DIM / 8; i += 32) {
        const uint4 value = from[i];
        if (is_new) held[i] = value;
        if (p.past > 0) all[i] = value;
    }
#endif
}
