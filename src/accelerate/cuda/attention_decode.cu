// Attention of one new query per sequence over its key/value cache, grouped-query ("flash decoding").
//
// Source: Dao, Haziza, Massa, Sizov 2023, "Flash-Decoding for long-context inference"; partial results are merged as in
// Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
//
// The host puts in front: common.cuh, attention_common.cuh, decode/overlap.cuh and
//   ATTN_NAME  entry point      HEAD_DIM  16, 24 ... 128, see attention_common.cuh
//   GROUP      query heads of one key head (heads / kv_heads), 1 to 8
//   OVERLAP    0, or 1: the next kernel may begin early, see decode/overlap.cuh
//   PART       0: one kernel; the last block of a (sequence, key head) merges the chunks
//              1: the chunks only        2: the merge only, launched after part 1
//   PAGE       0, or the tokens of a page, a multiple of 64: the cache of a sequence is paged (vLLM's
//              "PagedAttention", Kwon et al. 2023), named by row `table[sequence]` of `pages [.., table_width]`
//   CACHE_INT8 0, or 1: the cache is quantised, a level plus 128 in a byte, a scale f32 a row (`key_scales`, `value_scales`, one for
//              each HEAD_DIM bytes); rows of a head are contiguous then. A level is exact in bf16; the scale of a key
//              is a factor on its score, that of a value on its weight
//
// Shapes (bf16 unless said otherwise; the last dimension is contiguous, every row starts at a multiple of 16 bytes):
//   Q [batch, heads, HEAD_DIM]                    strides in elements
//   K, V [batch, kv_heads, capacity, HEAD_DIM]    the cache, the new token's key and value already in it; strides in elements
//   O [batch, heads * HEAD_DIM], contiguous       zeros where nothing is visible
//     with PAGE: [pages, kv_heads, PAGE, HEAD_DIM], the stride of a batch is that of a page; `first` is 0 then
//   first, end i32 [batch]                        visible cache rows [first, end), read on the device
//   partial f32 [batch, heads, splits, HEAD_DIM] and statistics f32 [batch, heads, splits, 2]: scratch, contents irrelevant
//   finished i32 [batch, kv_heads]                zeros before the first launch; every launch leaves zeros (part 1: not touched,
//     pass any buffer)
// Launch, parts 0 and 1: grid (splits, kv_heads, batch), 128 threads. `splits` is the most parts of one cache: about
//   2 * processors / (kv_heads * batch), at least 1, at most 64. Part 2: grid (1, kv_heads, batch), 128 threads; it takes
//   `splits` from the shape. No dynamic shared memory; static about GROUP * HEAD_DIM * 16 bytes (8 KiB at 4 x 128).
// The launch depends on no length, so a captured graph stays valid while the cache grows.
//
// How it reads memory: the 4 warps take strips of 16 keys in rotation. The tensor cores compute the matmuls with the
// query heads as rows (8 of 16 are used; bandwidth is the limit, not arithmetic). The order of the head dimension inside a matmul is free
// as long as both operands agree, so a lane loads 16 bytes of a key and uses them as they come, without shared memory:
//   scores:  lane l reads key l / 4, chunks l % 4 + 4 i; half a chunk is its share of one depth step.
//   output:  lane l reads values 2 (l % 4) + {0, 1, 8, 9}, chunk l / 4 + 8 i; element t of the chunk is its column of tile t.
//
// On an H100 (Nsight Compute, 32 and 8 heads of 128): 32 sequences of 370 tokens 67 % of the memory's rate, 21.7 us; one
// alone 9.8 us, which is launch and the latency of three dependent reads. 188 registers.

namespace attention {

static_assert(GROUP >= 1 && GROUP <= 8, "one tensor core tile holds 8 query heads");

struct DecodeShape {
  i64 q_batch, q_head;
  i64 k_batch, k_head, k_row;
  i64 v_batch, v_head, v_row;
  i64 kv_heads, capacity, splits;
  u64 scale_bits;  // f32 in the low half; positive
#if PAGE
  i64 table_width;
#endif
};

constexpr int WARPS = 4, THREADS = WARPS * 32, STRIP = 16;
constexpr int KEY_ROUNDS = (CHUNKS + 3) / 4;    // 16-byte loads of a lane for one key
constexpr int VALUE_ROUNDS = (CHUNKS + 7) / 8;  // and for one value

// The cache rows of one sequence, and how they are split: every chunk but the last has `chunk` rows, a whole number of rounds
// of the four warps. Short ranges give few chunks, and blocks without one return at once.
struct Cut {
  int first, end, chunk, chunks;
};
__device__ __forceinline__ Cut cut_cache(const int* first, const int* end, int batch, const DecodeShape& shape) {
  Cut cut;
  cut.first = max(first[batch], 0);
  cut.end = min(end[batch], (int)shape.capacity);
  const int length = max(cut.end - cut.first, 0), splits = (int)shape.splits;
  const int share = (length + splits - 1) / splits;
  cut.chunk = max((share + WARPS * STRIP - 1) / (WARPS * STRIP), 1) * (WARPS * STRIP);
  cut.chunks = (length + cut.chunk - 1) / cut.chunk;
  return cut;
}

// Past L1, whose lines another block's writes do not refresh.
__device__ __forceinline__ float4 read_fresh(const float4* p) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ float2 read_fresh(const float2* p) {
  float2 v;
  asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint4 read_chunk(const bf16* row, int chunk) {
  return CHUNKS % 8 == 0 || chunk < CHUNKS ? load_streaming_16(row + chunk * 8) : make_uint4(0, 0, 0, 0);
}

#if CACHE_INT8
using cached = unsigned char;
using CachedChunk = uint2;
__device__ __forceinline__ CachedChunk read_cached(const cached* row, int chunk) {
  uint2 v = make_uint2(0, 0);
  if (CHUNKS % 8 == 0 || chunk < CHUNKS)
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(row + chunk * 8));
  return v;
}
// Two levels as bf16: 128 + the low seven bits, minus 128, or 256 where the highest bit is not set (a level below zero).
__device__ __forceinline__ u32 levels(u32 word, u32 places) {
  const u32 bytes = __byte_perm(word, 0, places);
  u32 low, offset, pair;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(low) : "r"(bytes), "r"(0x007f007fu), "r"(0x43004300u));     // (a & b) | c
  asm("lop3.b32 %0, %1, %2, %3, 0xae;" : "=r"(offset) : "r"(bytes), "r"(0x00800080u), "r"(0x43004300u));  // (~a & b) | c
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(offset), "r"(0xbf80bf80u), "r"(low));
  return pair;
}
__device__ __forceinline__ uint4 as_bf16(CachedChunk chunk) {
  return make_uint4(levels(chunk.x, 0x4140), levels(chunk.x, 0x4342), levels(chunk.y, 0x4140), levels(chunk.y, 0x4342));
}
#else
using cached = bf16;
using CachedChunk = uint4;
__device__ __forceinline__ CachedChunk read_cached(const cached* row, int chunk) { return read_chunk(row, chunk); }
__device__ __forceinline__ uint4 as_bf16(CachedChunk chunk) { return chunk; }
#endif

// Merges the chunks of the query heads of one key head. `place` numbers (sequence, query head 0 of the group).
__device__ __forceinline__ void join_chunks(bf16* O, const float* partial, const float* statistics, i64 place, int chunks,
                                            int splits) {
  constexpr int QUADS = HEAD_DIM / 4;
  for (int item = threadIdx.x; item < GROUP * QUADS; item += THREADS) {
    const i64 head = place + item / QUADS;
    const int quad = item % QUADS;
    const float2* chunk_statistics = (const float2*)statistics + head * splits;  // largest score, sum
    const float4* chunk_output = (const float4*)partial + head * splits * QUADS + quad;
    float largest = -infinity();
#pragma unroll 8
    for (int s = 0; s < chunks; s++) largest = fmaxf(largest, read_fresh(chunk_statistics + s).x);
    float sum = 0.f;
    float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
    for (int s = 0; s < chunks; s++) {
      const float2 of_chunk = read_fresh(chunk_statistics + s);
      const float4 output = read_fresh(chunk_output + s * QUADS);
      // Every chunk holds at least one visible key, so `largest` is finite.
      const float weight = exp2_approx(of_chunk.x - largest);
      sum += weight * of_chunk.y;
      total.x += weight * output.x;
      total.y += weight * output.y;
      total.z += weight * output.z;
      total.w += weight * output.w;
    }
    const float inverse = chunks > 0 ? 1.f / sum : 0.f;
    *(uint2*)(O + head * HEAD_DIM + quad * 4) =
        make_uint2(pack_bf16x2(total.x * inverse, total.y * inverse), pack_bf16x2(total.z * inverse, total.w * inverse));
  }
}

#if PART == 2

extern "C" __global__ void __launch_bounds__(THREADS)
    ATTN_NAME(bf16* __restrict__ O, const int* __restrict__ first, const int* __restrict__ end,
              const float* __restrict__ partial, const float* __restrict__ statistics,
              const __grid_constant__ DecodeShape shape) {
  const int kv_head = blockIdx.y, batch = blockIdx.z;
  const Cut cut = cut_cache(first, end, batch, shape);
  join_chunks(O, partial, statistics, (batch * shape.kv_heads + kv_head) * GROUP, cut.chunks, (int)shape.splits);
}

#else

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    ATTN_NAME(const bf16* __restrict__ Q, const cached* __restrict__ K, const cached* __restrict__ V,
#if CACHE_INT8
              const float* __restrict__ key_scales, const float* __restrict__ value_scales,
#endif
              bf16* __restrict__ O, const int* __restrict__ first, const int* __restrict__ end,
#if PAGE
              const int* __restrict__ table, const int* __restrict__ pages,
#endif
              float* partial, float* statistics, int* finished, const __grid_constant__ DecodeShape shape) {
  __shared__ float warp_largest[WARPS][GROUP], warp_sum[WARPS][GROUP];
  __shared__ float warp_output[WARPS][GROUP][HEAD_DIM];
  __shared__ bool last;
  // It does not begin early itself: loads through `__restrict__` may be moved before a wait.
  let_next_begin();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int group = lane >> 2, quarter = lane & 3;  // result row (query head) and place in it
  const int split = blockIdx.x, kv_head = blockIdx.y, batch = blockIdx.z, splits = (int)shape.splits;
  const i64 head0 = (batch * shape.kv_heads + kv_head) * GROUP;  // of O, partial, statistics

  const Cut cut = cut_cache(first, end, batch, shape);
  if (cut.chunks == 0 && split == 0) {  // nothing visible: zeros, and no block to wait for
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM / 2; i += THREADS) ((u32*)(O + head0 * HEAD_DIM))[i] = 0;
  }
  if (split >= cut.chunks) return;
  const int chunk_first = cut.first + split * cut.chunk, chunk_end = min(chunk_first + cut.chunk, cut.end);

  uint4 query[KEY_ROUNDS];
  const bf16* q = Q + batch * shape.q_batch + ((i64)kv_head * GROUP + min(group, GROUP - 1)) * shape.q_head;
#pragma unroll
  for (int i = 0; i < KEY_ROUNDS; i++)
    query[i] = group < GROUP ? read_chunk(q, quarter + 4 * i) : make_uint4(0, 0, 0, 0);

#if PAGE
  const int* own_pages = pages + table[batch] * shape.table_width;
#else
  const cached* k_head = K + batch * shape.k_batch + kv_head * shape.k_head;
  const cached* v_head = V + batch * shape.v_batch + kv_head * shape.v_head;
#if CACHE_INT8
  const float* k_scales = key_scales + (batch * shape.k_batch + kv_head * shape.k_head) / HEAD_DIM;
  const float* v_scales = value_scales + (batch * shape.v_batch + kv_head * shape.v_head) / HEAD_DIM;
#endif
#endif
  const float scale_log2 = __uint_as_float((u32)shape.scale_bits) * LOG2_E;
  float output[VALUE_ROUNDS][8][4];  // only the upper eight rows, [0] and [1], hold results
#pragma unroll
  for (int i = 0; i < VALUE_ROUNDS; i++) clear(output[i]);
  float largest = -infinity(), sum = 0.f;  // `sum` is this lane's share

  for (int strip = chunk_first + warp * STRIP; strip < chunk_end; strip += WARPS * STRIP) {
#if PAGE
    // A strip is inside one page; rows are counted from the page's first.
    const i64 page = own_pages[strip / PAGE], in_page = strip / PAGE * PAGE;
    const cached* k_head = K + page * shape.k_batch + kv_head * shape.k_head - in_page * shape.k_row;
    const cached* v_head = V + page * shape.v_batch + kv_head * shape.v_head - in_page * shape.v_row;
#if CACHE_INT8
    const float* k_scales = key_scales + (page * shape.k_batch + kv_head * shape.k_head) / HEAD_DIM - in_page;
    const float* v_scales = value_scales + (page * shape.v_batch + kv_head * shape.v_head) / HEAD_DIM - in_page;
#endif
#endif
    // Rows past the end repeat the last one; their weight is zero.
    CachedChunk keys[2][KEY_ROUNDS], values[4][VALUE_ROUNDS];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const cached* row = k_head + min(strip + half * 8 + group, chunk_end - 1) * shape.k_row;
#pragma unroll
      for (int i = 0; i < KEY_ROUNDS; i++) keys[half][i] = read_cached(row, quarter + 4 * i);
    }
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const cached* row = v_head + min(strip + quarter * 2 + (n & 1) + (n >> 1) * 8, chunk_end - 1) * shape.v_row;
#pragma unroll
      for (int i = 0; i < VALUE_ROUNDS; i++) values[n][i] = read_cached(row, group + 8 * i);
    }
    float of_key[2][2], of_value[2][2];  // scales of keys and values strip + 8 half + 2 quarter + {0, 1}
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
#if CACHE_INT8
        const int at = min(strip + half * 8 + quarter * 2 + e, chunk_end - 1);
        of_key[half][e] = k_scales[at];
        of_value[half][e] = v_scales[at];
#else
        of_key[half][e] = of_value[half][e] = 1.f;
#endif
      }
    }

    float scores[2][4];  // of keys strip + 8 half + 2 quarter + {0, 1}
    clear(scores);
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int i = 0; i < KEY_ROUNDS; i++) {
        const u32 a0[4] = {query[i].x, 0, query[i].y, 0}, a1[4] = {query[i].z, 0, query[i].w, 0};
        const uint4 key = as_bf16(keys[half][i]);
        mma_m16n8k16(scores[half], a0, key.x, key.y);
        mma_m16n8k16(scores[half], a1, key.z, key.w);
      }
    }

    float strip_largest = -infinity();
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const bool visible = strip + half * 8 + quarter * 2 + e < chunk_end;
        scores[half][e] = visible ? scores[half][e] * (scale_log2 * of_key[half][e]) : -infinity();
        strip_largest = fmaxf(strip_largest, scores[half][e]);
      }
    }
    // The strip holds a visible key, so the new largest score is finite.
    const float now_largest = fmaxf(largest, quad_max(strip_largest));
    const float shrink = exp2_approx(largest - now_largest);
    largest = now_largest;
    sum *= shrink;
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        scores[half][e] = exp2_approx(scores[half][e] - largest);
        sum += scores[half][e];
      }
    }
    const u32 weights[4] = {pack_bf16x2(scores[0][0] * of_value[0][0], scores[0][1] * of_value[0][1]), 0,
                            pack_bf16x2(scores[1][0] * of_value[1][0], scores[1][1] * of_value[1][1]), 0};

#pragma unroll
    for (int i = 0; i < VALUE_ROUNDS; i++) {
      u32 rows[4][4];
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const uint4 value = as_bf16(values[n][i]);
        rows[n][0] = value.x;
        rows[n][1] = value.y;
        rows[n][2] = value.z;
        rows[n][3] = value.w;
      }
#pragma unroll
      for (int t = 0; t < 8; t++) {
        // Element t of two neighbouring values side by side: low halves for even t, high halves for odd t.
        const u32 halves = t & 1 ? 0x7632 : 0x5410;
        output[i][t][0] *= shrink;
        output[i][t][1] *= shrink;
        mma_m16n8k16(output[i][t], weights, __byte_perm(rows[0][t >> 1], rows[1][t >> 1], halves),
                     __byte_perm(rows[2][t >> 1], rows[3][t >> 1], halves));
      }
    }
  }

  // Merge the warps. One without a strip has largest = -inf and zeros; warp 0 always has one.
  sum = quad_sum(sum);
  if (group < GROUP) {
    if (quarter == 0) {
      warp_largest[warp][group] = largest;
      warp_sum[warp][group] = sum;
    }
#pragma unroll
    for (int i = 0; i < VALUE_ROUNDS; i++) {
#pragma unroll
      for (int t = 0; t < 8; t++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int chunk = quarter * 2 + e + 8 * i;  // result column 2 quarter + e of tile t: element t of that chunk
          if (chunk < CHUNKS) warp_output[warp][group][chunk * 8 + t] = output[i][t][e];
        }
      }
    }
  }
  __syncthreads();
  for (int item = threadIdx.x; item < GROUP * HEAD_DIM / 2; item += THREADS) {
    const int head = item / (HEAD_DIM / 2), column = item % (HEAD_DIM / 2) * 2;
    float top = warp_largest[0][head];
#pragma unroll
    for (int w = 1; w < WARPS; w++) top = fmaxf(top, warp_largest[w][head]);
    float total = 0.f, x = 0.f, y = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float weight = exp2_approx(warp_largest[w][head] - top);
      total += weight * warp_sum[w][head];
      x += weight * warp_output[w][head][column];
      y += weight * warp_output[w][head][column + 1];
    }
    if (PART == 0 && cut.chunks == 1) {
      *(u32*)(O + (head0 + head) * HEAD_DIM + column) = pack_bf16x2(x / total, y / total);
    } else {
      const i64 at = (head0 + head) * splits + split;
      *(float2*)(partial + at * HEAD_DIM + column) = make_float2(x, y);
      if (column == 0) *(float2*)(statistics + at * 2) = make_float2(top, total);
    }
  }

#if PART == 0
  if (cut.chunks == 1) return;
  // The last block to finish merges: each thread's writes are made visible before the block is counted.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int* counter = finished + batch * shape.kv_heads + kv_head;
    last = atomicAdd(counter, 1) == cut.chunks - 1;
    if (last) *counter = 0;  // for the next launch
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  join_chunks(O, partial, statistics, head0, cut.chunks, splits);
#endif
}

#endif

}  // namespace attention
