// Matmul (GEMM) for Hopper (sm_90a): output[M, N] = activation(A[M, K] * B + bias) + residual, bf16 in, f32 sums.
//
// The host puts common.cuh and gemm_epilogue.cuh in front, and above them
//
//   GEMM_NAME   name of the entry point
//   TILE_N      64, 96, 128, 192 or 256: columns of a tile; a tile has 128 rows
//   STAGES      slabs of K in flight; `plan.rs` chooses the most that fit
//   B_IS_KN     0: B is a weight W[N, K] and the result A * W^T (forward)
//               1: B is a weight W[K, N] and the result A * W (backward: dX = dY * W, with W as stored)
//   PAIRS       1 to 4: pairs of operands whose matmuls are summed before the epilogue, each with its own K:
//               A0 * B0 + A1 * B1 + ... (a layer with its adapter, all gradients of one input)
//   and the epilogue's OUT_F32.
//
// All matrices are row-major. Any M; N % 8 = 0 and K % 8 = 0 (16-byte rows); bases aligned to 16 bytes. Elements
// beyond an edge are read as zero by TMA and never written.
//
// Launch: 384 threads, grid min(SMs, tiles), dynamic shared memory
//   STAGES * stage + STAGES * 16 + 1024 bytes,  stage = (128 + B_STAGE_COLUMNS) * 128 bytes.
// Tensor maps (bf16, 128-byte swizzle, out of bounds filled with zeros), box in [rows, columns]:
//   A   [M, K]: box [128, 64]
//   B   [N, K]: box [TILE_N, 64];   [K, N]: box [64, 64], loaded once for each 64 columns of the tile
//
// How it works: a persistent, warp-specialised pipeline. Block b computes the tiles b, b + grid, b + 2 grid, ...
//
//   warpgroup 0    producer. One thread waits for an empty stage and starts the TMA copies of the next slab
//                  (64 of K) of A and B into it. 24 registers a thread.
//   warpgroups 1, 2  consumers of 64 rows each. They wait for a full stage, run four wgmma (16 of K each) on it and
//                  release it when they are done. 240 registers a thread, TILE_N / 2 of them accumulators.
//
//   full[s]    one arrival and the bytes of both copies: stage s can be read
//   empty[s]   one arrival of each consumer: stage s can be written
//
// The producer runs ahead past the end of a tile, so that the next tile's slabs arrive during the epilogue.
//
// A stage in shared memory, rows of 128 bytes, 16-byte chunk c of row r at chunk c ^ (r % 8):
//   A              128 rows m, 64 k
//   B, [N, K]      TILE_N rows n, 64 k ("K-major")
//   B, [K, N]      a block for each 64 columns n: 64 rows k, 64 n ("MN-major"), 8192 bytes a block
// A tile of 96 columns loads two such blocks in the [K, N] layout and uses one and a half.
//
// Source: PTX ISA, "Asynchronous warpgroup level matrix instructions" (descriptors, swizzled layouts) and
// "cp.async.bulk.tensor"; the structure is CUTLASS 3's `KernelTmaWarpSpecializedCooperative` with a persistent
// tile scheduler, without clusters.
//
// On an H100 (Nsight Compute), of the tensor cores' peak: backward with 5,888 rows 79 to 90 %, the most with two pairs
// and K 12,288; 16,384 patches, K 1,152, 38 to 58 %; 1,024 patches 40 %; 368 rows 57 % where 129 tiles fill one wave, and
// 21 % with the 48 tiles of 1,024 columns. 168 registers on average.

constexpr int TILE_M = 128;
constexpr int SLAB_K = 64;
constexpr int ROW_BYTES = SLAB_K * 2;  // a row of 64 bf16: the width of the swizzle
constexpr int CONSUMERS = 2;
constexpr int CONSUMER_ROWS = TILE_M / CONSUMERS;
constexpr int WARPGROUP = 128;
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;

constexpr int B_BLOCK_COLUMNS = 64;
constexpr int B_BLOCK_BYTES = SLAB_K * ROW_BYTES;
constexpr int B_BLOCKS = (TILE_N + B_BLOCK_COLUMNS - 1) / B_BLOCK_COLUMNS;
constexpr int B_STAGE_COLUMNS = B_IS_KN ? B_BLOCKS * B_BLOCK_COLUMNS : TILE_N;

constexpr int A_STAGE_BYTES = TILE_M * ROW_BYTES;
constexpr int STAGE_BYTES = A_STAGE_BYTES + B_STAGE_COLUMNS * ROW_BYTES;
constexpr int ACCUMULATORS = TILE_N / 2;  // a thread's share of 64 x TILE_N

// The opaque 128 bytes of a CUtensorMap.
struct alignas(64) TensorMap {
    u64 words[16];
};

// ---------------------------------------------------------------------------------- barriers and TMA

__device__ __forceinline__ void barrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the other threads and to the copy engine (before __syncthreads).
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase wait for `bytes` bytes of copies as well.
__device__ __forceinline__ void barrier_arrive_and_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the phase with this parity. On a fresh barrier, parity 1 returns at once.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra.uni DONE;\n"
        "bra.uni WAIT;\n"
        "DONE:\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Starts the copy of the map's box whose first element is [row, column]; its bytes count on `barrier`.
__device__ __forceinline__ void tma_load(u32 destination, const TensorMap& map, u32 barrier, int row, int column) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];\n" ::"r"(destination),
        "l"(&map), "r"(barrier), "r"(column), "r"(row)
        : "memory");
}

// -------------------------------------------------------------------------------------------- wgmma

// Shared-memory matrix descriptor: address / 16, leading offset / 16 (bits 16..), stride offset / 16 (bits 32..),
// 128-byte swizzle (bit 62). The stride is from one group of 8 rows to the next: 1024 bytes.
__device__ __forceinline__ u64 matrix_descriptor(u32 address, u32 leading_bytes) {
    return static_cast<u64>((address & 0x3ffff) >> 4) | static_cast<u64>(leading_bytes >> 4) << 16 |
           static_cast<u64>(1024 >> 4) << 32 | 1ull << 62;
}

// Rows along the m or n side, k along the row. The leading offset is not used with this swizzle.
__device__ __forceinline__ u64 k_major_descriptor(u32 address) {
    return matrix_descriptor(address, 16);
}

// Rows along k, n along the row: the leading offset is the distance to the next 64 columns.
__device__ __forceinline__ u64 n_major_descriptor(u32 address) {
    return matrix_descriptor(address, B_BLOCK_BYTES);
}

// One step in k (16) within a stage, in units of 16 bytes: 32 bytes along the row, or 16 rows down.
constexpr u64 A_STEP = 2;
constexpr u64 B_STEP = B_IS_KN ? 16 * ROW_BYTES / 16 : 2;

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

template <int OPEN_GROUPS>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(OPEN_GROUPS) : "memory");
}

// The text of wgmma.m64nNk16 names its N / 2 accumulators one by one: asm operands %0 to %(N / 2 - 1), then the
// two descriptors and the flag. TEN(t) is the ten operands t0 to t9; TEN() is 0 to 9.
#define TEN(t)                                                                                          \
    "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#if TILE_N == 64
#define ACCUMULATOR_NAMES TEN() TEN(1) TEN(2) "%30, %31"
#define DESCRIPTOR_NAMES "%32, %33"
#define FLAG_NAME "%34"
#elif TILE_N == 96
#define ACCUMULATOR_NAMES TEN() TEN(1) TEN(2) TEN(3) "%40, %41, %42, %43, %44, %45, %46, %47"
#define DESCRIPTOR_NAMES "%48, %49"
#define FLAG_NAME "%50"
#elif TILE_N == 128
#define ACCUMULATOR_NAMES TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60, %61, %62, %63"
#define DESCRIPTOR_NAMES "%64, %65"
#define FLAG_NAME "%66"
#elif TILE_N == 192
#define ACCUMULATOR_NAMES \
    TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) "%90, %91, %92, %93, %94, %95"
#define DESCRIPTOR_NAMES "%96, %97"
#define FLAG_NAME "%98"
#elif TILE_N == 256
#define ACCUMULATOR_NAMES                                                                          \
    TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11)           \
        "%120, %121, %122, %123, %124, %125, %126, %127"
#define DESCRIPTOR_NAMES "%128, %129"
#define FLAG_NAME "%130"
#else
#error "TILE_N must be 64, 96, 128, 192 or 256"
#endif

#define OPERANDS_8(i)                                                                              \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),    \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define OPERANDS_16(i) OPERANDS_8(i), OPERANDS_8(i + 8)
#define OPERANDS_32(i) OPERANDS_16(i), OPERANDS_16(i + 16)
#if TILE_N == 64
#define ACCUMULATOR_OPERANDS OPERANDS_32(0)
#elif TILE_N == 96
#define ACCUMULATOR_OPERANDS OPERANDS_32(0), OPERANDS_16(32)
#elif TILE_N == 128
#define ACCUMULATOR_OPERANDS OPERANDS_32(0), OPERANDS_32(32)
#elif TILE_N == 192
#define ACCUMULATOR_OPERANDS OPERANDS_32(0), OPERANDS_32(32), OPERANDS_32(64)
#else
#define ACCUMULATOR_OPERANDS OPERANDS_32(0), OPERANDS_32(32), OPERANDS_32(64), OPERANDS_32(96)
#endif

#define TEXT(x) #x
#define TEXT_OF(x) TEXT(x)

// d[64, TILE_N] = a[64, 16] * b[16, TILE_N] + (accumulate ? d : 0), by the 128 threads of a warpgroup, asynchronously.
// d[4 block + 2 half + i] of a thread is row 16 warp + lane / 4 + 8 half, column 8 block + 2 (lane % 4) + i.
__device__ __forceinline__ void wgmma_m64k16(float (&d)[ACCUMULATORS], u64 a, u64 b, int accumulate) {
    // After the flag: no negation of A, of B; A is K-major; B is K-major (0) or N-major (1).
    asm volatile(
        "{\n"
        ".reg .pred accumulate;\n"
        "setp.ne.b32 accumulate, " FLAG_NAME ", 0;\n"
        "wgmma.mma_async.sync.aligned.m64n" TEXT_OF(TILE_N) "k16.f32.bf16.bf16 "
        "{" ACCUMULATOR_NAMES "}, " DESCRIPTOR_NAMES ", accumulate, 1, 1, 0, " TEXT_OF(B_IS_KN) ";\n"
        "}\n"
        : ACCUMULATOR_OPERANDS
        : "l"(a), "l"(b), "r"(accumulate));
}

// ------------------------------------------------------------------------------------------- kernel

// A ring of stages: which one is next, and the parity of its phase.
struct StageCursor {
    int stage = 0;
    u32 parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// Addresses in shared memory, and the walk over the tiles.
struct Pipeline {
    u32 stages, full, empty;  // full[i] and empty[i] are 8 bytes apart
    int row_tiles, column_tiles, slabs;

    __device__ __forceinline__ u32 a(int stage) const { return stages + stage * STAGE_BYTES; }
    __device__ __forceinline__ u32 b(int stage) const { return a(stage) + A_STAGE_BYTES; }
    __device__ __forceinline__ int tiles() const { return row_tiles * column_tiles; }
    __device__ __forceinline__ TileOrigin origin(int tile) const {
        return tile_origin(tile, row_tiles, column_tiles, TILE_M, TILE_N);
    }
};

// Fills stages with the slabs of one pair of operands.
__device__ __forceinline__ void produce_pair(const Pipeline& pipeline, StageCursor& cursor, const TileOrigin& origin,
                                             const TensorMap& a_map, const TensorMap& b_map, int depth) {
    for (int k = 0; k < depth; k += SLAB_K) {
        const int stage = cursor.stage;
        const u32 full = pipeline.full + stage * 8;
        barrier_wait(pipeline.empty + stage * 8, cursor.parity ^ 1);
        barrier_arrive_and_expect(full, STAGE_BYTES);
        tma_load(pipeline.a(stage), a_map, full, origin.row, k);
#if B_IS_KN
#pragma unroll
        for (int block = 0; block < B_BLOCKS; block++)
            tma_load(pipeline.b(stage) + block * B_BLOCK_BYTES, b_map, full, k, origin.column + block * B_BLOCK_COLUMNS);
#else
        tma_load(pipeline.b(stage), b_map, full, origin.column, k);
#endif
        cursor.advance();
    }
}

// One warpgroup: its 64 rows of every tile of this block.
__device__ __forceinline__ void consume(const Pipeline& pipeline, int consumer, const Epilogue& epilogue) {
    const bool signals = threadIdx.x % WARPGROUP == 0;
    const int warp = threadIdx.x % WARPGROUP / 32;
    StageCursor cursor;
    for (int tile = blockIdx.x; tile < pipeline.tiles(); tile += gridDim.x) {
        float accumulators[ACCUMULATORS];
        int previous_stage = -1;
        for (int slab = 0; slab < pipeline.slabs; slab++) {
            const int stage = cursor.stage;
            barrier_wait(pipeline.full + stage * 8, cursor.parity);
            const u64 a = k_major_descriptor(pipeline.a(stage) + consumer * CONSUMER_ROWS * ROW_BYTES);
#if B_IS_KN
            const u64 b = n_major_descriptor(pipeline.b(stage));
#else
            const u64 b = k_major_descriptor(pipeline.b(stage));
#endif
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < SLAB_K / 16; step++)
                wgmma_m64k16(accumulators, a + step * A_STEP, b + step * B_STEP, (slab | step) != 0);
            wgmma_commit();
            // One group stays in flight, so that the tensor cores never wait for a barrier; with it issued, the
            // group before is done and its stage is free.
            if (previous_stage >= 0) {
                wgmma_wait<1>();
                if (signals) barrier_arrive(pipeline.empty + previous_stage * 8);
            }
            previous_stage = stage;
            cursor.advance();
        }
        wgmma_wait<0>();
        if (signals) barrier_arrive(pipeline.empty + previous_stage * 8);

        const TileOrigin origin = pipeline.origin(tile);
        const int warp_row = origin.row + consumer * CONSUMER_ROWS + warp * 16;
#pragma unroll
        for (int group = 0; group < TILE_N / 32; group++)
            finish_16x32(accumulators, group * 16, warp_row, origin.column + group * 32, epilogue);
    }
}

#define MAPS(i) const __grid_constant__ TensorMap a_map##i, const __grid_constant__ TensorMap b_map##i
#define MAPPED const bf16*, const bf16*

// The launcher passes the tensor maps first, then the pointers of the mapped buffers (not used), then the buffers.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
GEMM_NAME(MAPS(0),
#if PAIRS > 1
          MAPS(1),
#endif
#if PAIRS > 2
          MAPS(2),
#endif
#if PAIRS > 3
          MAPS(3),
#endif
          MAPPED,
#if PAIRS > 1
          MAPPED,
#endif
#if PAIRS > 2
          MAPPED,
#endif
#if PAIRS > 3
          MAPPED,
#endif
          Output* output, const bf16* bias, const bf16* residual, const __grid_constant__ GemmShape shape) {
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];

    Pipeline pipeline;
    pipeline.stages = (shared_address(dynamic_shared) + 1023) & ~1023u;  // the swizzle repeats every 1024 bytes
    pipeline.full = pipeline.stages + STAGES * STAGE_BYTES;
    pipeline.empty = pipeline.full + STAGES * 8;
    pipeline.row_tiles = (shape.m + TILE_M - 1) / TILE_M;
    pipeline.column_tiles = (shape.n + TILE_N - 1) / TILE_N;
    pipeline.slabs = (shape.k + SLAB_K - 1) / SLAB_K;
#pragma unroll
    for (int pair = 1; pair < PAIRS; pair++) pipeline.slabs += (shape.more_k[pair - 1] + SLAB_K - 1) / SLAB_K;

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(pipeline.full + stage * 8, 1);
            barrier_init(pipeline.empty + stage * 8, CONSUMERS);
        }
        barrier_init_fence();
    }
    __syncthreads();

    const int warpgroup = threadIdx.x / WARPGROUP;
    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;\n");
        // One thread fills the stages of every tile of this block.
        if (threadIdx.x == 0) {
            StageCursor cursor;
            for (int tile = blockIdx.x; tile < pipeline.tiles(); tile += gridDim.x) {
                const TileOrigin origin = pipeline.origin(tile);
                produce_pair(pipeline, cursor, origin, a_map0, b_map0, shape.k);
#if PAIRS > 1
                produce_pair(pipeline, cursor, origin, a_map1, b_map1, shape.more_k[0]);
#endif
#if PAIRS > 2
                produce_pair(pipeline, cursor, origin, a_map2, b_map2, shape.more_k[1]);
#endif
#if PAIRS > 3
                produce_pair(pipeline, cursor, origin, a_map3, b_map3, shape.more_k[2]);
#endif
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;\n");
        consume(pipeline, warpgroup - 1, make_epilogue(output, bias, residual, shape));
    }
}

#undef TEN
#undef ACCUMULATOR_NAMES
#undef DESCRIPTOR_NAMES
#undef FLAG_NAME
#undef OPERANDS_8
#undef OPERANDS_16
#undef OPERANDS_32
#undef ACCUMULATOR_OPERANDS
#undef TEXT
#undef TEXT_OF
