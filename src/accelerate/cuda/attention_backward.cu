// Attention, backward: gradients of Q, K and V of attention_forward.cu; grouped-query.
//
// Source: Dao 2023, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", algorithm 2.
// Per score s = scale * q k:  p = 2^(s log2(e) - LSE),  dP = dO v,  dS = p (dP - D)  with D = sum over a row of dO * O;
//   dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K.  p is recomputed from LSE instead of being stored.
//
// The host puts in front: common.cuh, attention_common.cuh and
//   ATTN_NAME  entry point      HEAD_DIM  16, 24 ... 128, see attention_common.cuh
//   PART       0: D                              grid ceil(batch * queries * heads / ROWS_A_BLOCK), 128 threads;
//                                                ROWS_A_BLOCK = 128 / (HEAD_DIM / 8 rounded up to a power of two): 8 at 128
//              1: dK and dV                      grid (ceil(keys / 64), kv_heads, batch), 128 threads
//              2: dQ, bf16                       grid (ceil(queries / 64), heads, batch), 128 threads
//              3: dQ from f32 to bf16            grid ceil(count / 1024), 256 threads (only with DQ_SUMS 1)
//   DQ_SUMS    for part 1. 0: dQ comes from part 2, bit for bit the same in every run. 1: part 1 accumulates dQ in f32
//              memory that the host set to zero, and part 3 replaces part 2: a fifth less arithmetic, but the order of
//              the sums, and so their last bits, change from run to run.
// Dynamic shared memory, with tile = 64 * ROW_BYTES (16,384 bytes at HEAD_DIM 128):
//   part 1: 6 tiles + 2,048, and 8,192 more with DQ_SUMS 1 (100,352 and 108,544 bytes at 128);  part 2: 6 tiles (98,304).
//
// Shapes (bf16 unless said otherwise; the last dimension is contiguous, every row starts at a multiple of 16 bytes):
//   Q, O, dO, dQ [batch, heads, queries, HEAD_DIM]    K, V, dK, dV [batch, kv_heads, keys, HEAD_DIM]   strides in elements
//   LSE (as the forward pass left it), D  f32 [batch, heads, queries], contiguous
//   first, end  i32 [batch, queries]: the keys a query row sees, [first, end)
//   first_query, end_query  i32 [batch, keys]: no query row outside [first_query, end_query) sees the key (rows inside may
//     still not see it; empty where no row does)
//   dQ for DQ_SUMS 1: f32 [batch, queries, heads, HEAD_DIM], contiguous
//
// Part 1: a warp owns 16 keys; scores are held transposed (keys x queries), so that P^T and dS^T are left operands in
// the registers they are computed in. The block loops over all query heads that share its keys and writes dK and dV
// once. Part 2: a warp owns 16 queries, as in the forward pass. Both copy the tiles they loop over asynchronously into
// two buffers.
//
// On an H100 (Nsight Compute, 16 rows of 368 tokens, 32 and 8 heads of 128): part 0 85 % of the memory's rate, 32 registers;
// part 1 67 % of the rate of shared memory, 255 registers; part 2 64 %, 240. The tensor cores are a third busy.

namespace attention {

constexpr int TILE = 64, THREADS = 128;
constexpr int TILE_BYTES = TILE * ROW_BYTES;

struct BackwardShape {
  i64 q_batch, q_head, q_row;
  i64 k_batch, k_head, k_row;
  i64 v_batch, v_head, v_row;
  i64 o_batch, o_head, o_row;     // of O, for part 0
  i64 do_batch, do_head, do_row;  // of dO
  i64 dq_batch, dq_head, dq_row;  // of the bf16 dQ
  i64 dk_batch, dk_head, dk_row;
  i64 dv_batch, dv_head, dv_row;
  i64 batch, heads, kv_heads, queries, keys;
  u64 scale_bits;  // f32 in the low half; positive
};

#if PART == 0

// A power of two of lanes takes one row, 16 bytes a lane. Rows are counted with heads fastest, the usual memory order of O.
constexpr int LANES_A_ROW = CHUNKS <= 2 ? 2 : CHUNKS <= 4 ? 4 : CHUNKS <= 8 ? 8 : 16;

__device__ __forceinline__ float dot_pair(u32 a, u32 b) { return low_bf16(a) * low_bf16(b) + high_bf16(a) * high_bf16(b); }

extern "C" __global__ void __launch_bounds__(THREADS)
    ATTN_NAME(const bf16* __restrict__ O, const bf16* __restrict__ dO, float* __restrict__ D,
              const __grid_constant__ BackwardShape shape) {
  const i64 number = (i64)blockIdx.x * (THREADS / LANES_A_ROW) + threadIdx.x / LANES_A_ROW;
  const int chunk = threadIdx.x % LANES_A_ROW;
  const bool inside = number < shape.batch * shape.queries * shape.heads;
  const i64 head = number % shape.heads, row = number / shape.heads % shape.queries, batch = number / shape.heads / shape.queries;
  float sum = 0.f;
  if (inside && chunk < CHUNKS) {
    const uint4 a = *(const uint4*)(O + batch * shape.o_batch + head * shape.o_head + row * shape.o_row + chunk * 8);
    const uint4 b = *(const uint4*)(dO + batch * shape.do_batch + head * shape.do_head + row * shape.do_row + chunk * 8);
    sum = dot_pair(a.x, b.x) + dot_pair(a.y, b.y) + dot_pair(a.z, b.z) + dot_pair(a.w, b.w);
  }
#pragma unroll
  for (int distance = LANES_A_ROW / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
  if (inside && chunk == 0) D[(batch * shape.heads + head) * shape.queries + row] = sum;
}

#elif PART == 1

// The data of a tile of queries besides Q and dO, in shared memory, double buffered.
struct QueryNumbers {
  float lse[TILE], row_sum[TILE];
  int first[TILE], end[TILE];
};

// Queries that may see any of the block's keys: the union over the keys.
struct QuerySpan {
  int low, high;
};
__device__ __forceinline__ QuerySpan span_queries(const int* first_query, const int* end_query, int key, int keys, int queries) {
  int low = INT_HIGHEST, high = INT_LOWEST;
#pragma unroll
  for (int i = 0; i < TILE; i += 32) {
    const int k = min(key + i + (int)(threadIdx.x & 31), keys - 1);
    const int from = max(first_query[k], 0), to = min(end_query[k], queries);
    if (from < to) {
      low = min(low, from);
      high = max(high, to);
    }
  }
  return {__reduce_min_sync(ALL_LANES, low), __reduce_max_sync(ALL_LANES, high)};
}

// Address of element (key row, chunk of 8 queries) of the 64 x 64 dS^T tile.
__device__ __forceinline__ u32 gradient_address(u32 tile, int row, int chunk) {
  return tile + row * 128 + ((chunk ^ (row & 7)) << 4);
}
__device__ __forceinline__ void store_shared(u32 to, u32 value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}
__device__ __forceinline__ void add_pair(float* to, float x, float y) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x), "f"(y) : "memory");
#else
  atomicAdd(to, x);
  atomicAdd(to + 1, y);
#endif
}

// dQ[16 queries of this warp] += scale * dS K, straight into memory. `head` points at the head's first query.
__device__ __forceinline__ void add_query_gradient(float* head, i64 row_stride, int query, int queries, u32 gradient_tile,
                                                   u32 key_tile, float scale) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  u32 left[4][4];  // dS, 16 queries x 64 keys: the stored tile transposed
#pragma unroll
  for (int depth = 0; depth < 4; depth++) {
    const u32 address = gradient_address(gradient_tile, depth * 16 + ((lane >> 4) << 3) + (lane & 7), warp * 2 + ((lane >> 3) & 1));
    load_matrix_x4_transposed(address, left[depth][0], left[depth][1], left[depth][2], left[depth][3]);
  }
  const int row = query + warp * 16 + (lane >> 2);
#pragma unroll
  for (int j = 0; j < DEPTH_STEPS; j++) {
    float result[2][4];
    clear(result);
#pragma unroll
    for (int depth = 0; depth < 4; depth++) {
      u32 b[4];
      load_right_elements(key_tile, depth * 16, j, b);
      mma_m16n8k16(result[0], left[depth], b[0], b[1]);
      mma_m16n8k16(result[1], left[depth], b[2], b[3]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (2 * j + half >= CHUNKS) continue;
      float* to = head + row * row_stride + (2 * j + half) * 8 + (lane & 3) * 2;
      if (row < queries) add_pair(to, result[half][0] * scale, result[half][1] * scale);
      if (row + 8 < queries) add_pair(to + 8 * row_stride, result[half][2] * scale, result[half][3] * scale);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    ATTN_NAME(const bf16* __restrict__ Q, const bf16* __restrict__ K, const bf16* __restrict__ V, const bf16* __restrict__ dO,
              const float* __restrict__ LSE, const float* __restrict__ D, const int* __restrict__ first,
              const int* __restrict__ end, const int* __restrict__ first_query, const int* __restrict__ end_query,
              bf16* __restrict__ dK, bf16* __restrict__ dV,
#if DQ_SUMS
              float* dQ,
#endif
              const __grid_constant__ BackwardShape shape) {
  extern __shared__ __align__(256) unsigned char shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int queries = (int)shape.queries, keys = (int)shape.keys, heads = (int)shape.heads;
  const int group = (int)(shape.heads / shape.kv_heads);
  const BlockPlace place = place_block();  // the first key tile has most queries in a causal mask
  const int key0 = place.tile * TILE, head0 = place.head * group;

  const u32 key_tile = shared_address(shared), value_tile = key_tile + TILE_BYTES;
  const u32 query_tiles = value_tile + TILE_BYTES;          // two of them
  const u32 gradient_out_tiles = query_tiles + 2 * TILE_BYTES;  // dO, two of them
  QueryNumbers* const numbers = (QueryNumbers*)(shared + 6 * TILE_BYTES);

  load_tile_async<TILE, THREADS>(key_tile, K + place.batch * shape.k_batch + place.head * shape.k_head, (int)shape.k_row, key0,
                                 0, keys);
  load_tile_async<TILE, THREADS>(value_tile, V + place.batch * shape.v_batch + place.head * shape.v_head, (int)shape.v_row,
                                 key0, 0, keys);
  const QuerySpan span = span_queries(first_query + (i64)place.batch * keys, end_query + (i64)place.batch * keys, key0, keys, queries);
  const int tiles = span.low < span.high ? (span.high - span.low + TILE - 1) / TILE : 0;
  const int rounds = tiles * group;  // all query tiles of one head, then the next head

  auto load_queries_async = [&](int round) {
    const int head = head0 + round / tiles, query = span.low + round % tiles * TILE;
    const u32 buffer = (round & 1) * TILE_BYTES;
    load_tile_async<TILE, THREADS>(query_tiles + buffer, Q + place.batch * shape.q_batch + head * shape.q_head,
                                   (int)shape.q_row, query, 0, span.high);
    load_tile_async<TILE, THREADS>(gradient_out_tiles + buffer, dO + place.batch * shape.do_batch + head * shape.do_head,
                                   (int)shape.do_row, query, 0, span.high);
    // The first half of the threads fetches one pair of arrays, the second half the other.
    const int row = threadIdx.x % TILE, source = min(query + row, queries - 1);
    const i64 of_head = ((i64)place.batch * heads + head) * queries + source, of_sequence = (i64)place.batch * queries + source;
    QueryNumbers* to = numbers + (round & 1);
    if (threadIdx.x < TILE) {
      copy_async_4(shared_address(to->lse + row), LSE + of_head);
      copy_async_4(shared_address(to->row_sum + row), D + of_head);
    } else {
      copy_async_4(shared_address(to->first + row), first + of_sequence);
      copy_async_4(shared_address(to->end + row), end + of_sequence);
    }
  };
  if (rounds > 0) load_queries_async(0);
  copy_async_commit();

  float key_gradient[CHUNKS][4], value_gradient[CHUNKS][4];
  clear(key_gradient);
  clear(value_gradient);
  const float scale = __uint_as_float((u32)shape.scale_bits), scale_log2 = scale * LOG2_E;
  const int warp_key = key0 + warp * 16, row = warp_key + (lane >> 2);

  for (int round = 0; round < rounds; round++) {
    if (round + 1 < rounds) load_queries_async(round + 1);
    copy_async_commit();  // also when empty, so that one group stays pending after this round's
    copy_async_wait<1>();
    __syncthreads();
    const int query = span.low + round % tiles * TILE;
    const u32 buffer = (round & 1) * TILE_BYTES;
    const QueryNumbers& of = numbers[round & 1];

    // Do all queries of the tile see all keys of this warp, or none any? A lane checks two queries.
    bool sees_all = true, sees_any = false;
#pragma unroll
    for (int i = 0; i < TILE; i += 32) {
      const bool inside = query + i + lane < span.high;
      const int from = of.first[i + lane], to = min(of.end[i + lane], keys);
      sees_all &= inside && from <= warp_key && to >= warp_key + 16;
      sees_any |= inside && max(from, warp_key) < min(to, warp_key + 16);
    }
    sees_all = __all_sync(ALL_LANES, sees_all);
    sees_any = __any_sync(ALL_LANES, sees_any);

    if (DQ_SUMS || sees_any) {
      float weights[8][4], gradients[8][4];  // P^T, dS^T: 16 keys x 64 queries
      clear(weights);
      clear(gradients);
      multiply_rows(weights, key_tile, warp * 16, query_tiles + buffer);
      multiply_rows(gradients, value_tile, warp * 16, gradient_out_tiles + buffer);
#pragma unroll
      for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int column = j * 8 + (lane & 3) * 2 + e;
          const float lse = of.lse[column], row_sum = of.row_sum[column];
          float upper = exp2_approx(weights[j][e] * scale_log2 - lse), lower = exp2_approx(weights[j][2 + e] * scale_log2 - lse);
          if (!sees_all) {
            const int from = of.first[column], to = query + column < span.high ? min(of.end[column], keys) : from;
            if (row < from || row >= to) upper = 0.f;
            if (row + 8 < from || row + 8 >= to) lower = 0.f;
          }
          weights[j][e] = upper;
          weights[j][2 + e] = lower;
          gradients[j][e] = upper * (gradients[j][e] - row_sum);
          gradients[j][2 + e] = lower * (gradients[j][2 + e] - row_sum);
        }
      }
      u32 left[4][4];
      pack_left(weights, left);
      multiply_elements(value_gradient, left, gradient_out_tiles + buffer);
      pack_left(gradients, left);
#if DQ_SUMS
#pragma unroll
      for (int depth = 0; depth < 4; depth++) {
#pragma unroll
        for (int part = 0; part < 4; part++) {  // fragment part: rows +8 for odd ones, queries +8 for the last two
          const u32 address = gradient_address(shared_address(numbers + 2), warp * 16 + (lane >> 2) + (part & 1) * 8,
                                               depth * 2 + (part >> 1));
          store_shared(address + (lane & 3) * 4, left[depth][part]);
        }
      }
#endif
      multiply_elements(key_gradient, left, query_tiles + buffer);
    }
    __syncthreads();  // the next round's copies go into the buffers just read; dS^T is complete
#if DQ_SUMS
    // The next round writes dS^T only after its own first barrier.
    const i64 row_stride = (i64)heads * HEAD_DIM;
    add_query_gradient(dQ + (i64)place.batch * queries * row_stride + (head0 + round / tiles) * HEAD_DIM, row_stride, query,
                       span.high, shared_address(numbers + 2), key_tile, scale);
#endif
  }

  store_rows(dK + place.batch * shape.dk_batch + place.head * shape.dk_head, shape.dk_row, row, keys, key_gradient, scale, scale);
  store_rows(dV + place.batch * shape.dv_batch + place.head * shape.dv_head, shape.dv_row, row, keys, value_gradient, 1.f, 1.f);
}

#elif PART == 2

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    ATTN_NAME(const bf16* __restrict__ Q, const bf16* __restrict__ K, const bf16* __restrict__ V, const bf16* __restrict__ dO,
              const float* __restrict__ LSE, const float* __restrict__ D, const int* __restrict__ first,
              const int* __restrict__ end, bf16* __restrict__ dQ, const __grid_constant__ BackwardShape shape) {
  extern __shared__ __align__(256) unsigned char shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int queries = (int)shape.queries, keys = (int)shape.keys;
  const BlockPlace place = place_block();
  const int query0 = ((int)gridDim.x - 1 - place.tile) * TILE;  // longest first, as in the forward pass
  const int kv_head = place.head / (int)(shape.heads / shape.kv_heads);

  const bf16* k_head = K + place.batch * shape.k_batch + kv_head * shape.k_head;
  const bf16* v_head = V + place.batch * shape.v_batch + kv_head * shape.v_head;
  const int k_row = (int)shape.k_row, v_row = (int)shape.v_row;
  first += (i64)place.batch * queries;
  end += (i64)place.batch * queries;

  const u32 query_tile = shared_address(shared), gradient_out_tile = query_tile + TILE_BYTES;
  const u32 key_tiles = gradient_out_tile + TILE_BYTES;  // two of them
  const u32 value_tiles = key_tiles + 2 * TILE_BYTES;    // two of them
  load_tile_async<TILE, THREADS>(query_tile, Q + place.batch * shape.q_batch + place.head * shape.q_head, (int)shape.q_row,
                                 query0, 0, queries);
  load_tile_async<TILE, THREADS>(gradient_out_tile, dO + place.batch * shape.do_batch + place.head * shape.do_head,
                                 (int)shape.do_row, query0, 0, queries);

  const RangeSummary block = summarise<TILE>(first, end, query0, queries, keys);
  const int tiles = block.any_first < block.any_end ? (block.any_end - block.any_first + TILE_KEYS - 1) / TILE_KEYS : 0;
  auto load_keys_async = [&](int tile) {
    const int key = block.any_first + tile * TILE_KEYS;
    const u32 buffer = (tile & 1) * TILE_BYTES;
    load_tile_async<TILE_KEYS, THREADS>(key_tiles + buffer, k_head, k_row, key, 0, block.any_end);
    load_tile_async<TILE_KEYS, THREADS>(value_tiles + buffer, v_head, v_row, key, 0, block.any_end);
  };
  if (tiles > 0) load_keys_async(0);
  copy_async_commit();

  const int row = query0 + warp * 16 + (lane >> 2);
  const VisibleRange ranges[2] = {read_range(first, end, row, queries, keys), read_range(first, end, row + 8, queries, keys)};
  RangeSummary rows = no_ranges();
  add_range(rows, ranges[0]);
  add_range(rows, ranges[1]);
  rows = join_lanes(rows);
  float lse[2], row_sum[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const bool inside = row + 8 * i < queries;
    const i64 at = ((i64)place.batch * shape.heads + place.head) * queries + (inside ? row + 8 * i : 0);
    lse[i] = inside ? LSE[at] : infinity();  // no weight
    row_sum[i] = inside ? D[at] : 0.f;
  }

  float query_gradient[CHUNKS][4];
  clear(query_gradient);
  const float scale = __uint_as_float((u32)shape.scale_bits), scale_log2 = scale * LOG2_E;

  for (int tile = 0; tile < tiles; tile++) {
    if (tile + 1 < tiles) load_keys_async(tile + 1);
    copy_async_commit();  // also when empty, so that one group stays pending after this tile's
    copy_async_wait<1>();
    __syncthreads();
    const int key = block.any_first + tile * TILE_KEYS;
    if (!rows.none_in(key, TILE_KEYS)) {
      const u32 buffer = (tile & 1) * TILE_BYTES;
      float scores[8][4], gradients[8][4];  // 16 queries x 64 keys
      clear(scores);
      clear(gradients);
      multiply_rows(scores, query_tile, warp * 16, key_tiles + buffer);
      multiply_rows(gradients, gradient_out_tile, warp * 16, value_tiles + buffer);
      const bool masked = !rows.all_in(key, TILE_KEYS);
#pragma unroll
      for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float weight = exp2_approx(scores[j][i] * scale_log2 - lse[i >> 1]);
          if (masked && !ranges[i >> 1].sees(key + j * 8 + (lane & 3) * 2 + (i & 1))) weight = 0.f;
          gradients[j][i] = weight * (gradients[j][i] - row_sum[i >> 1]);
        }
      }
      u32 left[4][4];
      pack_left(gradients, left);
      multiply_elements(query_gradient, left, key_tiles + buffer);
    }
    __syncthreads();  // the next round's copies go into the buffer just read
  }
  store_rows(dQ + place.batch * shape.dq_batch + place.head * shape.dq_head, shape.dq_row, row, queries, query_gradient, scale,
             scale);
}

#else

struct CastShape {
  i64 count;  // elements, a multiple of 4
};

extern "C" __global__ void __launch_bounds__(256)
    ATTN_NAME(const float* __restrict__ sums, bf16* __restrict__ dQ, const __grid_constant__ CastShape shape) {
  const i64 at = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (at >= shape.count) return;
  const float4 x = *(const float4*)(sums + at);
  *(uint2*)(dQ + at) = make_uint2(pack_bf16x2(x.x, x.y), pack_bf16x2(x.z, x.w));
}

#endif

}  // namespace attention
