// New keys and values of one layer into the pages of their sequence, and after a prefix also all of
// them, the earlier ones included, into contiguous buffers: the attention of a prompt's next chunk reads these.
// One warp a row of a head, keys and values in one launch.
//
// new_keys, new_values [heads, rows, HEAD_DIM] with strides for head and row; table [pages of the
// sequence]; pool [pages, heads, PAGE, HEAD_DIM]; all_keys, all_values [heads, past + rows, HEAD_DIM],
// written where past > 0. HEAD_DIM is a multiple of 8. Limit: launch.
// Source: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention".
// On an H100: 3.2 us, 22 registers.

struct Parameters {
    u64 heads, rows, past;
    u64 key_strides[2], value_strides[2];
    u64 keys, values;  // addresses of the layer's pools
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
    u16* pool = (u16*)(is_key ? p.keys : p.values);
    uint4* held = (uint4*)(pool + (((u64)table[token / PAGE] * p.heads + head) * PAGE + token % PAGE) * HEAD_DIM);
    uint4* all = (uint4*)((is_key ? all_keys : all_values) + (head * tokens + token) * HEAD_DIM);
    const u64* strides = is_key ? p.key_strides : p.value_strides;
    const bool is_new = token >= p.past;
    const uint4* from = is_new ? (const uint4*)((is_key ? new_keys : new_values) + head * strides[0] + (token - p.past) * strides[1])
                               : held;
    for (int i = threadIdx.x & 31; i < HEAD_DIM / 8; i += 32) {
        const uint4 value = from[i];
        if (is_new) held[i] = value;
        if (p.past > 0) all[i] = value;
    }
}
