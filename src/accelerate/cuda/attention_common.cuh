// What the attention kernels share: tiles of head rows in shared memory, tensor core fragments, visible ranges.
//
// The host puts it before each attention source and after common.cuh; includes nothing (NVRTC has no CUDA headers).
// Needs HEAD_DIM: elements of one head's row, a multiple of 8 from 16 to 128. sm_80 and newer.
//
// Tile: ROWS rows of one head, each padded with zeros to a multiple of 16 elements (the depth of one tensor core step).
// A row is cut into chunks of 16 bytes (8 elements). ldmatrix reads one chunk from 8 neighbouring rows at a time; these must
// be in different banks. Where a row is a multiple of 128 bytes the chunk number is xor-ed with the row number; elsewhere a
// row gets one unused chunk more, so that its length is an odd number of chunks.
//
// Visible range: query row i sees the keys [first[i], end[i]) and no others; empty when first[i] >= end[i]. This one form
// covers causal masks, packed samples, left and right padding, and one image among many.

namespace attention {

using i64 = long long;

static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM >= 16 && HEAD_DIM <= 128, "HEAD_DIM is a multiple of 8 from 16 to 128");

constexpr int CHUNKS = HEAD_DIM / 8;                             // 16-byte pieces of a row in global memory
constexpr int DEPTH_STEPS = (HEAD_DIM + 15) / 16;                // tensor core steps along the head dimension
constexpr int PADDED_CHUNKS = DEPTH_STEPS * 2;                   // pieces of a row in shared memory, zeros at the end
constexpr bool SWIZZLED = PADDED_CHUNKS % 8 == 0;
constexpr int ROW_BYTES = PADDED_CHUNKS * 16 + (SWIZZLED ? 0 : 16);
constexpr int TILE_KEYS = 64;
constexpr u32 ALL_LANES = 0xffffffffu;
constexpr int INT_LOWEST = -2147483647 - 1;
constexpr int INT_HIGHEST = 2147483647;
constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

__device__ __forceinline__ void copy_async_4(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}

__device__ __forceinline__ u32 tile_address(u32 tile, int row, int chunk) {
  return tile + row * ROW_BYTES + ((SWIZZLED ? chunk ^ (row & 7) : chunk) << 4);
}

// Starts copying rows [row, row + ROWS) of one head into a tile. Rows outside [low, high), and the padding, become zeros.
// Offsets inside a head are 32 bits wide (they save registers): rows * row_stride stays below 2^31 elements.
template <int ROWS, int THREADS>
__device__ __forceinline__ void load_tile_async(u32 tile, const bf16* head, int row_stride, int row, int low, int high) {
  constexpr int PIECES = ROWS * PADDED_CHUNKS;
#pragma unroll
  for (int round = 0; round < (PIECES + THREADS - 1) / THREADS; round++) {
    int in_tile, chunk;
    if constexpr (THREADS % PADDED_CHUNKS == 0) {
      in_tile = threadIdx.x / PADDED_CHUNKS + round * (THREADS / PADDED_CHUNKS);
      chunk = threadIdx.x % PADDED_CHUNKS;
    } else {
      in_tile = (threadIdx.x + round * THREADS) / PADDED_CHUNKS;
      chunk = (threadIdx.x + round * THREADS) % PADDED_CHUNKS;
    }
    if (PIECES % THREADS != 0 && in_tile >= ROWS) break;
    const int source_row = row + in_tile;
    const bool valid = source_row >= low && source_row < high && (PADDED_CHUNKS == CHUNKS || chunk < CHUNKS);
    // Where nothing is read the address is the head's first: choosing the offset takes a register less.
    const bf16* source = head + (valid ? source_row * row_stride + chunk * 8 : 0);
    copy_async_16_or_zero(tile_address(tile, in_tile, chunk), source, source, valid);
  }
}

// Fragments of mma.m16n8k16. A lane owns, of a 16 x 8 result c: (lane / 4, 2 (lane % 4) + {0, 1}) in c[0], c[1] and the same
// eight rows lower in c[2], c[3].

// Address of this lane's row of an ldmatrix: `row` is a multiple of 8, `lane_row` (0 to 15) and `lane_chunk` (0 or 1) are the
// lane's own part. Equals tile_address(tile, row + lane_row, 2 * step + lane_chunk); written so that one register serves all
// steps and rows. Swizzled tiles start at a multiple of 256 bytes.
__device__ __forceinline__ u32 lane_address(u32 tile, int row, int lane_row, int step, int lane_chunk) {
  const u32 base = tile_address(tile, lane_row, lane_chunk);
  return (SWIZZLED ? base ^ (step * 32) : base + step * 32) + row * ROW_BYTES;
}
// Left operand: 16 rows from `row` on, depth = 16 elements at `step`.
__device__ __forceinline__ void load_left(u32 tile, int row, int step, u32 (&a)[4]) {
  const int lane = threadIdx.x & 31;
  load_matrix_x4(lane_address(tile, row, lane & 15, step, lane >> 4), a[0], a[1], a[2], a[3]);
}
// Right operand with the tile's rows as result columns: 16 rows from `row` on, depth = 16 elements at `step`.
// b[0], b[1] serve the first eight columns, b[2], b[3] the others.
__device__ __forceinline__ void load_right_rows(u32 tile, int row, int step, u32 (&b)[4]) {
  const int lane = threadIdx.x & 31;
  const u32 address = lane_address(tile, row, (lane & 7) + ((lane >> 4) << 3), step, (lane >> 3) & 1);
  load_matrix_x4(address, b[0], b[1], b[2], b[3]);
}
// Right operand with the head's elements as result columns: depth = 16 rows from `row` on, 16 elements at `step`.
__device__ __forceinline__ void load_right_elements(u32 tile, int row, int step, u32 (&b)[4]) {
  const int lane = threadIdx.x & 31;
  load_matrix_x4_transposed(lane_address(tile, row, lane & 15, step, lane >> 4), b[0], b[1], b[2], b[3]);
}
template <int COUNT>
__device__ __forceinline__ void clear(float (&fragments)[COUNT][4]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) fragments[i][0] = fragments[i][1] = fragments[i][2] = fragments[i][3] = 0.f;
}

// Sums or takes the maximum over the four lanes that share a result row.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(ALL_LANES, x, 1);
  return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// result[16 x 64] += left[16 rows of `left` from left_row] * right[64 rows]^T, over the head dimension.
__device__ __forceinline__ void multiply_rows(float (&result)[8][4], u32 left, int left_row, u32 right) {
#pragma unroll
  for (int step = 0; step < DEPTH_STEPS; step++) {
    u32 a[4];
    load_left(left, left_row, step, a);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      u32 b[4];
      load_right_rows(right, j * 16, step, b);
      mma_m16n8k16(result[2 * j], a, b[0], b[1]);
      mma_m16n8k16(result[2 * j + 1], a, b[2], b[3]);
    }
  }
}

// result[16 x HEAD_DIM] += left[16 x 64, fragments of four depth steps] * right[64 rows x HEAD_DIM].
__device__ __forceinline__ void multiply_elements(float (&result)[CHUNKS][4], const u32 (&left)[4][4], u32 right) {
#pragma unroll
  for (int depth = 0; depth < 4; depth++) {
#pragma unroll
    for (int j = 0; j < DEPTH_STEPS; j++) {
      u32 b[4];
      load_right_elements(right, depth * 16, j, b);
      mma_m16n8k16(result[2 * j], left[depth], b[0], b[1]);
      if (2 * j + 1 < CHUNKS) mma_m16n8k16(result[(2 * j + 1) % CHUNKS], left[depth], b[2], b[3]);
    }
  }
}

// Converts a 16 x 64 result into the left operand of the next matmul, in registers.
__device__ __forceinline__ void pack_left(const float (&values)[8][4], u32 (&left)[4][4]) {
#pragma unroll
  for (int depth = 0; depth < 4; depth++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      left[depth][2 * half] = pack_bf16x2(values[2 * depth + half][0], values[2 * depth + half][1]);
      left[depth][2 * half + 1] = pack_bf16x2(values[2 * depth + half][2], values[2 * depth + half][3]);
    }
  }
}

// Writes this lane's two rows of a 16 x HEAD_DIM result as bf16, multiplied by `upper` and `lower`.
__device__ __forceinline__ void store_rows(bf16* head, i64 row_stride, int row, int rows, const float (&result)[CHUNKS][4],
                                           float upper, float lower) {
  const int column = (threadIdx.x & 3) * 2;
#pragma unroll
  for (int j = 0; j < CHUNKS; j++) {
    if (row < rows) *(u32*)(head + row * row_stride + j * 8 + column) = pack_bf16x2(result[j][0] * upper, result[j][1] * upper);
    if (row + 8 < rows)
      *(u32*)(head + (row + 8) * row_stride + j * 8 + column) = pack_bf16x2(result[j][2] * lower, result[j][3] * lower);
  }
}

// Keys one query row sees.
struct VisibleRange {
  int first, end;
  __device__ __forceinline__ bool empty() const { return first >= end; }
  // One comparison: keys before `first` wrap round to large numbers.
  __device__ __forceinline__ bool sees(int key) const { return (u32)(key - first) < (u32)(end - first); }
};

// `first` and `end` point at the sequence's rows; rows past the last one repeat it (their results are not written).
__device__ __forceinline__ VisibleRange read_range(const int* first, const int* end, int row, int rows, int keys) {
  row = min(row, rows - 1);
  VisibleRange range = {max(first[row], 0), min(end[row], keys)};
  if (range.empty()) range.end = range.first;  // so that `sees` is false for every key
  return range;
}

// Keys seen by any, and by every, row of a set; empty rows count in neither (they give zeros whatever is computed for them).
struct RangeSummary {
  int any_first, any_end, every_first, every_end;
  __device__ __forceinline__ bool none_in(int key, int count) const { return key >= any_end || key + count <= any_first; }
  __device__ __forceinline__ bool all_in(int key, int count) const { return key >= every_first && key + count <= every_end; }
};

__device__ __forceinline__ RangeSummary no_ranges() { return {INT_HIGHEST, INT_LOWEST, INT_LOWEST, INT_HIGHEST}; }
__device__ __forceinline__ void add_range(RangeSummary& all, VisibleRange range) {
  if (range.empty()) return;
  all.any_first = min(all.any_first, range.first);
  all.any_end = max(all.any_end, range.end);
  all.every_first = max(all.every_first, range.first);
  all.every_end = min(all.every_end, range.end);
}
__device__ __forceinline__ RangeSummary join_lanes(RangeSummary all) {
  return {__reduce_min_sync(ALL_LANES, all.any_first), __reduce_max_sync(ALL_LANES, all.any_end),
          __reduce_max_sync(ALL_LANES, all.every_first), __reduce_min_sync(ALL_LANES, all.every_end)};
}
// Over the ROWS query rows from `row` on; every warp reads them all, which saves a barrier.
template <int ROWS>
__device__ __forceinline__ RangeSummary summarise(const int* first, const int* end, int row, int rows, int keys) {
  RangeSummary all = no_ranges();
#pragma unroll
  for (int i = 0; i < ROWS; i += 32) add_range(all, read_range(first, end, row + i + (threadIdx.x & 31), rows, keys));
  return join_lanes(all);
}

// The heads of one tile are neighbours in launch order (they share keys), and tiles are launched from `tile` 0 on.
struct BlockPlace {
  int tile, head, batch;
};
__device__ __forceinline__ BlockPlace place_block() {
  const int number = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int others = gridDim.y * gridDim.z;
  return {number / others, (number % others) % (int)gridDim.y, (number % others) / (int)gridDim.y};
}

}  // namespace attention
