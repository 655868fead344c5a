// Attention, forward: O = softmax(scale * Q K^T) V over each query row's visible keys; grouped-query.
//
// Source: Dao 2023, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", algorithm 1.
//
// The host puts in front: common.cuh, attention_common.cuh and
//   ATTN_NAME  entry point      HEAD_DIM  16, 24 ... 128, see attention_common.cuh
//   TILE_Q     query rows of a block: 128 (8 warps), or 64 (4 warps) where 128 would leave processors idle
//   WITH_LSE   1: write LSE, which the backward pass needs; 0: the LSE argument is not touched (pass any buffer)
//
// Shapes (bf16 unless said otherwise; the last dimension is contiguous, every row starts at a multiple of 16 bytes):
//   Q [batch, heads, queries, HEAD_DIM]           K, V [batch, kv_heads, keys, HEAD_DIM]     strides in elements
//   O [batch, heads, queries, HEAD_DIM]           rows without visible keys are zeros
//   LSE f32 [batch, heads, queries], contiguous   log2 of the sum of 2^(scores * log2(e)); +inf for rows without visible keys
//   first, end i32 [batch, queries], contiguous   visible keys of a row: [first, end)
// Launch: grid (ceil(queries / TILE_Q), heads, batch), TILE_Q * 2 threads,
//   (TILE_Q + 256) * ROW_BYTES of dynamic shared memory: 98,304 (128) or 81,920 bytes (64) at HEAD_DIM 128.
//
// A warp owns 16 query rows: Q fragments, scores and output stay in registers. Tiles of 64 keys and values are copied in the
// background into two buffers. Keys outside the union of the block's ranges are never read, so that they may be
// uninitialised; a tile that is visible to all rows of a warp is not masked.
//
// On an H100 (Nsight Compute): 16 images of 1,024 patches, 16 heads of 72, 61 % of the rate of shared memory, which is what
// bounds it; the tensor cores are a third busy. One image 58 %. A row of 5,888 tokens packed from 16, 32 and 8 heads of 128:
// 47 %. 184 and 222 registers.

namespace attention {

struct ForwardShape {
  i64 q_batch, q_head, q_row;
  i64 k_batch, k_head, k_row;
  i64 v_batch, v_head, v_row;
  i64 o_batch, o_head, o_row;
  i64 heads, kv_heads, queries, keys;
  u64 scale_bits;  // f32 in the low half; positive
};

constexpr int THREADS = TILE_Q * 2;
constexpr int BLOCKS_PER_PROCESSOR = TILE_Q == 128 ? 1 : (HEAD_DIM <= 64 ? 3 : 2);

// scores[16 x 64] = Q K^T
__device__ __forceinline__ void score(float (&scores)[8][4], const u32 (&query)[DEPTH_STEPS][4], u32 key_tile) {
  clear(scores);
#pragma unroll
  for (int step = 0; step < DEPTH_STEPS; step++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      u32 b[4];
      load_right_rows(key_tile, j * 16, step, b);
      mma_m16n8k16(scores[2 * j], query[step], b[0], b[1]);
      mma_m16n8k16(scores[2 * j + 1], query[step], b[2], b[3]);
    }
  }
}

__device__ __forceinline__ void mask(float (&scores)[8][4], int key, VisibleRange upper, VisibleRange lower) {
  key += (threadIdx.x & 3) * 2;
#pragma unroll
  for (int j = 0; j < 8; j++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      if (!upper.sees(key + j * 8 + e)) scores[j][e] = -infinity();
      if (!lower.sees(key + j * 8 + e)) scores[j][2 + e] = -infinity();
    }
  }
}

// Largest score and sum of exponentials so far of this lane's upper (0) and lower (1) row; `sum` is the lane's share.
struct OnlineSoftmax {
  float largest[2], sum[2];
};

// Online softmax: scores become 2^(scale (score - largest)), and earlier sums are rescaled to the new largest score.
__device__ __forceinline__ void update_softmax(OnlineSoftmax& state, float (&scores)[8][4], float (&output)[CHUNKS][4],
                                               float scale_log2) {
#pragma unroll
  for (int row = 0; row < 2; row++) {
    float largest = state.largest[row];
#pragma unroll
    for (int j = 0; j < 8; j++) largest = fmaxf(largest, fmaxf(scores[j][2 * row], scores[j][2 * row + 1]));
    largest = quad_max(largest);
    // While a row has seen no key its largest score is -inf; subtracting that from itself would give NaN.
    const float reference = largest == -infinity() ? 0.f : largest * scale_log2;
    const float shrink = exp2_approx(state.largest[row] * scale_log2 - reference);
    state.largest[row] = largest;
    float sum = state.sum[row] * shrink;
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float weight = exp2_approx(scores[j][2 * row + e] * scale_log2 - reference);
        scores[j][2 * row + e] = weight;
        sum += weight;
      }
    }
    state.sum[row] = sum;
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
      output[j][2 * row] *= shrink;
      output[j][2 * row + 1] *= shrink;
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_PROCESSOR)
    ATTN_NAME(const bf16* __restrict__ Q, const bf16* __restrict__ K, const bf16* __restrict__ V, bf16* __restrict__ O,
              float* __restrict__ LSE, const int* __restrict__ first, const int* __restrict__ end,
              const __grid_constant__ ForwardShape shape) {
  extern __shared__ __align__(256) unsigned char shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int queries = (int)shape.queries, keys = (int)shape.keys;
  const BlockPlace place = place_block();
  // The last query tile sees most in a causal mask: launching it first balances the load.
  const int query0 = ((int)gridDim.x - 1 - place.tile) * TILE_Q;
  const int kv_head = place.head / (int)(shape.heads / shape.kv_heads);

  const bf16* q_head = Q + place.batch * shape.q_batch + place.head * shape.q_head;
  const bf16* k_head = K + place.batch * shape.k_batch + kv_head * shape.k_head;
  const bf16* v_head = V + place.batch * shape.v_batch + kv_head * shape.v_head;
  const int k_row = (int)shape.k_row, v_row = (int)shape.v_row;
  first += (i64)place.batch * queries;
  end += (i64)place.batch * queries;

  constexpr int KEY_TILE_BYTES = TILE_KEYS * ROW_BYTES;
  const u32 query_tile = shared_address(shared);
  const u32 key_tiles = query_tile + TILE_Q * ROW_BYTES;   // two of them
  const u32 value_tiles = key_tiles + 2 * KEY_TILE_BYTES;  // two of them

  load_tile_async<TILE_Q, THREADS>(query_tile, q_head, (int)shape.q_row, query0, 0, queries);
  copy_async_commit();

  const RangeSummary block = summarise<TILE_Q>(first, end, query0, queries, keys);
  const int tiles = block.any_first < block.any_end ? (block.any_end - block.any_first + TILE_KEYS - 1) / TILE_KEYS : 0;
  auto load_keys_async = [&](int tile) {
    const int key = block.any_first + tile * TILE_KEYS;
    const u32 buffer = (tile & 1) * KEY_TILE_BYTES;
    load_tile_async<TILE_KEYS, THREADS>(key_tiles + buffer, k_head, k_row, key, 0, block.any_end);
    load_tile_async<TILE_KEYS, THREADS>(value_tiles + buffer, v_head, v_row, key, 0, block.any_end);
  };
  if (tiles > 0) load_keys_async(0);
  copy_async_commit();

  const int row = query0 + warp * 16 + (lane >> 2);
  const VisibleRange upper = read_range(first, end, row, queries, keys);
  const VisibleRange lower = read_range(first, end, row + 8, queries, keys);
  RangeSummary rows = no_ranges();
  add_range(rows, upper);
  add_range(rows, lower);
  rows = join_lanes(rows);

  copy_async_wait<1>();  // the queries
  __syncthreads();
  u32 query[DEPTH_STEPS][4];
#pragma unroll
  for (int step = 0; step < DEPTH_STEPS; step++) load_left(query_tile, warp * 16, step, query[step]);

  float output[CHUNKS][4];
  clear(output);
  OnlineSoftmax state = {{-infinity(), -infinity()}, {0.f, 0.f}};
  const float scale_log2 = __uint_as_float((u32)shape.scale_bits) * LOG2_E;

  for (int tile = 0; tile < tiles; tile++) {
    if (tile + 1 < tiles) load_keys_async(tile + 1);
    copy_async_commit();  // also when empty, so that one group stays pending after this tile's
    copy_async_wait<1>();
    __syncthreads();
    const int key = block.any_first + tile * TILE_KEYS;
    if (!rows.none_in(key, TILE_KEYS)) {
      const u32 buffer = (tile & 1) * KEY_TILE_BYTES;
      float scores[8][4];
      score(scores, query, key_tiles + buffer);
      if (!rows.all_in(key, TILE_KEYS)) mask(scores, key, upper, lower);
      update_softmax(state, scores, output, scale_log2);
      u32 weights[4][4];
      pack_left(scores, weights);
      multiply_elements(output, weights, value_tiles + buffer);
    }
    __syncthreads();  // the next round's copies go into the buffer just read
  }

  // A row without visible keys may share unmasked tiles with its neighbours: its sums there are discarded.
  float upper_sum = quad_sum(state.sum[0]), lower_sum = quad_sum(state.sum[1]);
  if (upper.empty()) upper_sum = 0.f;
  if (lower.empty()) lower_sum = 0.f;
  bf16* o_head = O + place.batch * shape.o_batch + place.head * shape.o_head;
  store_rows(o_head, shape.o_row, row, queries, output, upper_sum > 0.f ? 1.f / upper_sum : 0.f,
             lower_sum > 0.f ? 1.f / lower_sum : 0.f);
#if WITH_LSE
  if ((lane & 3) == 0) {
    float* lse = LSE + ((i64)place.batch * shape.heads + place.head) * queries;
    if (row < queries) lse[row] = upper_sum > 0.f ? state.largest[0] * scale_log2 + log2f(upper_sum) : infinity();
    if (row + 8 < queries) lse[row + 8] = lower_sum > 0.f ? state.largest[1] * scale_log2 + log2f(lower_sum) : infinity();
  }
#endif
}

}  // namespace attention
