// Writes new keys and values into their position in a cache; one warp a row of a head, keys and values in one launch.
//
// from [batch, heads, new, HEAD_DIM] with strides for batch, head and row; to [batch, heads, capacity,
// HEAD_DIM] contiguous, from token `at` on. HEAD_DIM is a multiple of 8. Limit: launch.
// On an H100: 3.7 us for 368 tokens, 24 registers.

struct Parameters {
    u64 batch, heads, rows, capacity, at;
    u64 key_strides[3], value_strides[3];
};

extern "C" __global__ void __launch_bounds__(256)
ENTRY(const u16* new_keys, const u16* new_values, u16* keys, u16* values, const __grid_constant__ Parameters p) {
    const u64 item = (u64)blockIdx.x * 8 + (threadIdx.x >> 5);
    const u64 all = p.batch * p.heads * p.rows;
    if (item >= 2 * all) return;
    const bool is_key = item < all;
    const u64 index = is_key ? item : item - all;
    const u64 head = index % p.heads, row = index / p.heads % p.rows, batch = index / p.heads / p.rows;
    const u64* strides = is_key ? p.key_strides : p.value_strides;
    const u16* from = (is_key ? new_keys : new_values) + batch * strides[0] + head * strides[1] + row * strides[2];
    u16* to = (is_key ? keys : values) + ((batch * p.heads + head) * p.capacity + p.at + row) * HEAD_DIM;
    const int lane = threadIdx.x & 31;
    for (int i = lane; i < HEAD_DIM / 8; i += 32) ((uint4*)to)[i] = ((const uint4*)from)[i];
}
