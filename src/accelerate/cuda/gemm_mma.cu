// Matmul (GEMM) for Ampere and later (sm_80): output[M, N] = activation(A[M, K] * B + bias) + residual, bf16 in,
// f32 sums.
//
// The host puts common.cuh and gemm_epilogue.cuh in front, and above them
//
//   GEMM_NAME         name of the entry point
//   TILE_M, TILE_N    the tile of a block
//   WARP_M, WARP_N    the part of it that one warp computes
//   STAGES            slabs of K in shared memory, at least 2
//   BLOCKS_PER_SM     blocks that should share a multiprocessor: bounds the registers
//   B_IS_KN           0: B is a weight W[N, K] and the result A * W^T (forward)
//                     1: B is a weight W[K, N] and the result A * W (backward: dX = dY * W, with W as stored)
//   and the epilogue's OUT_F32.
//
// All matrices are row-major. Any M; N % 8 = 0 and K % 8 = 0 (16-byte rows); bases aligned to 16 bytes. Elements
// beyond an edge are zero in shared memory and never written.
//
// Launch: 32 threads for each warp of a tile, one block for each tile, dynamic shared memory
//   STAGES * (TILE_M + TILE_N) * 128 bytes.
//
//   tile       warp      warps  stages  shared      for
//   64 x 64    32 x 32   4      4       64 KiB      few tiles, two or three blocks on a multiprocessor
//   64 x 128   32 x 64   4      3       72 KiB      two blocks on a multiprocessor
//   128 x 128  64 x 64   4      3       96 KiB      two blocks on a multiprocessor of 228 KiB (sm_90), one elsewhere
//   128 x 128  64 x 32   8      4       128 KiB     one block: more warps to hide latency (sm_80)
//   128 x 256  64 x 64   8      3 or 4  144 or 192  many tiles; 4 stages only on sm_90
//
// How it works: while the warps multiply slab s (64 of K), cp.async fetches the slabs s + 1 .. s + STAGES - 1. Within
// a slab, the fragments of the next 16 of K are read from shared memory (ldmatrix) during the mma of
// this one, in two sets of registers.
//
// A stage in shared memory, rows of 128 bytes, 16-byte chunk c of row r at chunk c ^ (r % 8), so that neither
// cp.async nor ldmatrix meets a bank conflict:
//   A            TILE_M rows m, 64 k
//   B, [N, K]    TILE_N rows n, 64 k
//   B, [K, N]    a block for each 64 columns n: 64 rows k, 64 n; read with the transposing ldmatrix
//
// Source: the multistage pipeline of CUTLASS 2.x (`DefaultMmaMultistage`); fragments after the PTX ISA,
// mma.m16n8k16.
//
// On an H100 (Nsight Compute), of what mma.sync can do there: 77 % with 5,888 rows, 12,288 columns and K 4,096; 37 to 51 %
// with 368 rows, whose tiles do not fill the last wave. Registers 252 and 254 (128 rows), 176 (64 x 128), 120 (64 x 64).

constexpr int SLAB_K = 64;
constexpr int ROW_BYTES = SLAB_K * 2;
constexpr int CHUNK = 8;  // bf16 in 16 bytes
constexpr int ROW_CHUNKS = SLAB_K / CHUNK;

constexpr int WARPS_M = TILE_M / WARP_M;
constexpr int WARPS_N = TILE_N / WARP_N;
constexpr int THREADS = WARPS_M * WARPS_N * 32;

constexpr int A_FRAGMENTS = WARP_M / 16;      // of 16 rows
constexpr int B_FRAGMENTS = WARP_N / 16;      // of 16 columns: two column blocks of an mma
constexpr int ROW_ACCUMULATORS = WARP_N / 2;  // a thread's share of 16 x WARP_N

constexpr int A_STAGE_BYTES = TILE_M * ROW_BYTES;
constexpr int STAGE_BYTES = A_STAGE_BYTES + TILE_N * ROW_BYTES;
constexpr int B_BLOCK_COLUMNS = 64;  // in the [K, N] layout
constexpr int B_BLOCK_BYTES = SLAB_K * ROW_BYTES;

constexpr int PASS_ROWS = THREADS / ROW_CHUNKS;  // rows that all threads copy at once, a chunk each

static_assert(TILE_M % WARP_M == 0 && TILE_N % WARP_N == 0, "warps must fill the tile");
static_assert(WARP_M % 16 == 0 && WARP_N % 32 == 0, "the epilogue works on 16 x 32");
static_assert(TILE_M % PASS_ROWS == 0 && TILE_N % PASS_ROWS == 0 && SLAB_K % PASS_ROWS == 0, "whole passes");
static_assert(PASS_ROWS % 8 == 0, "all rows of a thread have the same swizzle");
static_assert(TILE_N % B_BLOCK_COLUMNS == 0 && STAGES >= 2, "see above");

// Byte offset of 16-byte chunk `chunk` of row `row`.
__device__ __forceinline__ u32 swizzled(int row, int chunk) {
    return row * ROW_BYTES + ((chunk ^ (row & 7)) << 4);
}

// Copies slab after slab of ROWS rows of a [rows, K] matrix. Thread t has chunk t % 8 of row t / 8 and of every
// PASS_ROWS-th row after it.
template <int ROWS>
struct RowLoader {
    const bf16* matrix;  // a valid address, for chunks out of range
    const bf16* source;  // this thread's chunk of the next slab
    size_t stride;       // elements from a row to the next
    int rows_left;       // rows of the matrix from this thread's first row on
    int k_left;          // columns of the matrix from this thread's chunk of the next slab on

    __device__ __forceinline__ RowLoader(const bf16* matrix, int rows, int k, int first_row) : matrix(matrix) {
        const int row = first_row + threadIdx.x / ROW_CHUNKS, column = threadIdx.x % ROW_CHUNKS * CHUNK;
        stride = k;
        source = matrix + row * stride + column;
        rows_left = rows - row;
        k_left = k - column;
    }

    __device__ __forceinline__ void load(u32 destination) {
#pragma unroll
        for (int first = 0; first < ROWS; first += PASS_ROWS)
            copy_async_16_or_zero(destination + first * ROW_BYTES, source + first * stride, matrix,
                                  first < rows_left && k_left > 0);
        source += SLAB_K;
        k_left -= SLAB_K;
    }
};

// Copies slab after slab of TILE_N columns of a [K, N] matrix, in blocks of 64 columns. Thread t has, in every
// block, chunk t % 8 of row t / 8 of k and of every PASS_ROWS-th row after it.
struct ColumnBlockLoader {
    const bf16* matrix;
    const bf16* source;
    size_t stride;
    int columns_left;
    int k_left;

    __device__ __forceinline__ ColumnBlockLoader(const bf16* matrix, int k, int columns, int first_column)
        : matrix(matrix) {
        const int row = threadIdx.x / ROW_CHUNKS, column = first_column + threadIdx.x % ROW_CHUNKS * CHUNK;
        stride = columns;
        source = matrix + row * stride + column;
        columns_left = columns - column;
        k_left = k - row;
    }

    __device__ __forceinline__ void load(u32 destination) {
#pragma unroll
        for (int block = 0; block < TILE_N / B_BLOCK_COLUMNS; block++)
#pragma unroll
            for (int first = 0; first < SLAB_K; first += PASS_ROWS)
                copy_async_16_or_zero(destination + block * B_BLOCK_BYTES + first * ROW_BYTES,
                                      source + first * stride + block * B_BLOCK_COLUMNS, matrix,
                                      first < k_left && block * B_BLOCK_COLUMNS < columns_left);
        source += SLAB_K * stride;
        k_left -= SLAB_K;
    }
};

// What a warp multiplies in one step of 16 of K.
struct Fragments {
    u32 a[A_FRAGMENTS][4];
    u32 b[B_FRAGMENTS][4];  // [0], [1]: first 8 columns, k 0-7 and 8-15; [2], [3]: the next 8 columns

    // `a_rows`, `b_columns`: where the warp's part starts within the tile. `step`: 0..3 within the slab.
    __device__ __forceinline__ void load(u32 stage, int step, int a_rows, int b_columns) {
        const int lane = threadIdx.x & 31;
        const u32 b_stage = stage + A_STAGE_BYTES;
        // Lanes 0-15 address the 16 rows at k 0-7 of the step, lanes 16-31 the same at k 8-15.
#pragma unroll
        for (int i = 0; i < A_FRAGMENTS; i++)
            load_matrix_x4(stage + swizzled(a_rows + i * 16 + lane % 16, 2 * step + lane / 16), a[i][0], a[i][1],
                           a[i][2], a[i][3]);
#pragma unroll
        for (int j = 0; j < B_FRAGMENTS; j++) {
#if B_IS_KN
            // Rows are k: lanes 0-15 address 16 of them at the first 8 columns, lanes 16-31 at the next 8.
            const int column = b_columns + j * 16;
            const u32 block = b_stage + column / B_BLOCK_COLUMNS * B_BLOCK_BYTES;
            const int chunk = column % B_BLOCK_COLUMNS / CHUNK + lane / 16;
            load_matrix_x4_transposed(block + swizzled(16 * step + lane % 16, chunk), b[j][0], b[j][1], b[j][2],
                                      b[j][3]);
#else
            // Rows are n: lanes 0-7 and 8-15 address the first 8 of them at k 0-7 and 8-15, lanes 16-31 the next 8.
            const int row = b_columns + j * 16 + lane % 8 + lane / 16 * 8;
            load_matrix_x4(b_stage + swizzled(row, 2 * step + lane / 8 % 2), b[j][0], b[j][1], b[j][2], b[j][3]);
#endif
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
GEMM_NAME(const bf16* a_matrix, const bf16* b_matrix, Output* output,
          const bf16* bias, const bf16* residual,
          const __grid_constant__ GemmShape shape) {
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    const u32 stages = shared_address(dynamic_shared);
    const int warp = threadIdx.x / 32;
    const int warp_rows = warp % WARPS_M * WARP_M, warp_columns = warp / WARPS_M * WARP_N;

    const int row_tiles = (shape.m + TILE_M - 1) / TILE_M, column_tiles = (shape.n + TILE_N - 1) / TILE_N;
    const TileOrigin origin = tile_origin(blockIdx.x, row_tiles, column_tiles, TILE_M, TILE_N);
    const int slabs = (shape.k + SLAB_K - 1) / SLAB_K;

    // Past the last slab the loaders write zeros that are never read; so no group of copies is ever missing.
    RowLoader<TILE_M> a_loader(a_matrix, shape.m, shape.k, origin.row);
#if B_IS_KN
    ColumnBlockLoader b_loader(b_matrix, shape.k, shape.n, origin.column);
#else
    RowLoader<TILE_N> b_loader(b_matrix, shape.n, shape.k, origin.column);
#endif
    const u32 thread_offset = swizzled(threadIdx.x / ROW_CHUNKS, threadIdx.x % ROW_CHUNKS);
    int write_stage = 0, read_stage = 0;
    auto load_slab = [&]() {
        const u32 destination = stages + write_stage * STAGE_BYTES + thread_offset;
        a_loader.load(destination);
        b_loader.load(destination + A_STAGE_BYTES);
        copy_async_commit();
        write_stage = write_stage + 1 == STAGES ? 0 : write_stage + 1;
    };

    float accumulators[A_FRAGMENTS][ROW_ACCUMULATORS];
#pragma unroll
    for (int i = 0; i < A_FRAGMENTS; i++)
#pragma unroll
        for (int j = 0; j < ROW_ACCUMULATORS; j++) accumulators[i][j] = 0.0f;

#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) load_slab();
    copy_async_wait<STAGES - 2>();
    __syncthreads();

    constexpr int STEPS = SLAB_K / 16;
    Fragments fragments[2];
    fragments[0].load(stages, 0, warp_rows, warp_columns);
    for (int slab = 0; slab < slabs; slab++) {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            if (step + 1 < STEPS) {
                fragments[(step + 1) % 2].load(stages + read_stage * STAGE_BYTES, step + 1, warp_rows, warp_columns);
            } else {
                // The next slab has arrived, for every thread; and every warp has read the last of this one, so
                // that the load at the next step 0 may overwrite it.
                copy_async_wait<STAGES - 2>();
                __syncthreads();
                read_stage = read_stage + 1 == STAGES ? 0 : read_stage + 1;
                fragments[0].load(stages + read_stage * STAGE_BYTES, 0, warp_rows, warp_columns);
            }
            if (step == 0) load_slab();

            Fragments& now = fragments[step % 2];
#pragma unroll
            for (int i = 0; i < A_FRAGMENTS; i++)
#pragma unroll
                for (int j = 0; j < 2 * B_FRAGMENTS; j++)
                    mma_m16n8k16(&accumulators[i][4 * j], now.a[i], now.b[j / 2][j % 2 * 2], now.b[j / 2][j % 2 * 2 + 1]);
        }
    }

    copy_async_wait<0>();  // the zeros past the last slab

    const Epilogue epilogue = make_epilogue(output, bias, residual, shape);
#pragma unroll
    for (int i = 0; i < A_FRAGMENTS; i++)
#pragma unroll
        for (int group = 0; group < WARP_N / 32; group++)
            finish_16x32(accumulators[i], group * 16, origin.row + warp_rows + i * 16,
                         origin.column + warp_columns + group * 32, epilogue);
}
