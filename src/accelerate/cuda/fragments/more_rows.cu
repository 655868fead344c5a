// Matmul of quantised weights with 17 to 64 vectors: Y[B, N] = X[B, K] W[N, K]^T, bf16 in, f32 sums on the tensor cores.
//
// A block owns BLOCK_TILES tiles of 16 rows of W, a warp each (with GATE half of them of each matrix), and of K the chunks of split
// blockIdx.y. Vectors come through shared memory, VECTOR_TURNS turns at once and the next ones meanwhile (cp.async), for all warps; so
// do weights, a warp's for itself, STAGES turns ahead: warps wait for each other only where the vectors change, and while
// one reads them from shared memory, another multiplies. With SPLIT_BLOCKS the last block of a tile adds the splits in order.
//
// `partial` f32 [SPLITS][MATRICES][TILES * 8][rows], contents irrelevant; `counters` u32 [gridDim.x], zeros before and after.
// Dynamic shared memory: two buffers of vectors and the stages of weights, or the sums if they need more. STAGES is at most
// VECTOR_TURNS + 1: vectors asked for with a turn's weights have come when those have.

// Limit: shared memory and the tensor cores' issue, not memory: a piece of weights meets every vector. On an H200, 8 and 4 bits, for 32
// vectors: gate and up 37.3 and 37.1 us (63 and 34 % of a copy's rate), down 27.8 and 25.6, q, k and v 16.5 and 14.6, output 14.2 and
// 12.3, head 220; for 64: 54.9 and 60.4, 43.5 and 40.3, 25.2 and 22.6, 22.2 and 19.1, 318. 110 to 168 registers.

#define WARPS BLOCK_TILES
#define PITCH (VECTOR_TURNS * TURN * 2)
#define VECTORS (TILES * 8 * PITCH)
#define OWN_WORDS (PIECES * 512)
#define OWN_STAGE (OWN_WORDS + (BITS == 8 ? 0 : GROUPS * 32))
#define SUM_ROWS (WARPS * 16 + 4)
static_assert(STAGES <= VECTOR_TURNS + 1 && STAGES >= 2, "vectors come in time");

__device__ __forceinline__ u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }
__device__ __forceinline__ void copy_async(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
__device__ __forceinline__ uint4 read_shared(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}
__device__ __forceinline__ u32 read_shared_word(u32 at) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
    return v;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) ENTRY(KERNEL_OPERANDS, const __grid_constant__ Parameters p) {
    extern __shared__ __align__(128) unsigned char memory[];
#if NORM
    __shared__ float factors[TILES * 8];
#endif
    let_next_begin();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int k = (int)p.k, batch = (int)p.batch;
    const int pieces = k / COLUMNS, turns = (k + TURN - 1) / TURN;
    const int split = blockIdx.y, first_chunk = CHUNKS / SPLITS * split, chunks_end = CHUNKS / SPLITS * (split + 1);
    const int begin = turns * first_chunk / CHUNKS, end = turns * chunks_end / CHUNKS;
    int width = (int)p.rows[0];
#if WEIGHTS > 1 && !GATE
    width += (int)p.rows[1];
#endif
#if WEIGHTS > 2
    width += (int)p.rows[2];
#endif
    const int tiles = width / 16, output_tiles = WARPS / MATRICES;
    auto place_of = [&](int tile) {
        Place place = {words0, scales0, 0, tile};
#if WEIGHTS > 1 && !GATE
        if (place.tile >= (int)p.rows[0] / 16) {
            place = {words1, scales1, 1, tile - (int)p.rows[0] / 16};
#if WEIGHTS > 2
            if (place.tile >= (int)p.rows[1] / 16) place = {words2, scales2, 2, place.tile - (int)p.rows[1] / 16};
#endif
        }
#endif
        return place;
    };
    // Tiles past the end repeat the last one and are not stored.
    const Place place = place_of(min((int)blockIdx.x * output_tiles + warp % output_tiles, tiles - 1));
    const uint4* words = place.words;
    const Scale* scales = place.scales;
#if GATE
    if (warp >= output_tiles) {
        words = words1;
        scales = scales1;
    }
#endif
    words += (u64)place.tile * pieces * 32 + lane;
#if BITS == 4
    scales += (u64)place.tile * (k / GROUP) * 8;
#endif
    const u32 base = shared_address(memory), own = base + 2 * VECTORS + warp * STAGES * OWN_STAGE;
    // What is past K is read again from its end: the products with it are left out.
    auto copy_weights = [&](int stage, int turn) {
        const u32 to = own + stage * OWN_STAGE;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const int piece = WHOLE ? turn * PIECES + i : min(turn * PIECES + i, pieces - 1);
            copy_async(to + i * 512 + lane * 16, words + piece * 32);
        }
#if BITS == 4
        if (lane < GROUPS * 2) {
            const int group = turn * GROUPS + (lane >> 1);
            copy_async(to + OWN_WORDS + lane * 16, scales + (WHOLE ? group : min(group, k / GROUP - 1)) * 8 + (lane & 1) * 4);
        }
#endif
    };
    auto copy_vectors = [&](int buffer, int turn) {
#pragma unroll 4
        for (int i = threadIdx.x; i < TILES * 8 * VECTOR_TURNS * 16; i += WARPS * 32) {
            const int vector = i / (VECTOR_TURNS * 16), chunk = i % (VECTOR_TURNS * 16), column = turn * TURN + chunk * 8;
            if (turn + chunk / 16 >= end) continue;
            copy_async(base + buffer * VECTORS + vector * PITCH + ((chunk ^ ((vector & 1) << 2)) << 4),
                       x + (u64)min(vector, batch - 1) * k + (WHOLE ? column : min(column, k - 8)));
        }
    };
    for (int i = 0; i < STAGES - 1; i++) {
        if (begin + i < end) copy_weights(i, begin + i);
        commit();
    }
    wait_for_last();
    copy_vectors(0, begin);
    commit();
#if NORM
    norm_factors<WARPS>(squares, factors, p);
#endif
    wait_for_copies<0>();
    float total[TILES][4], acc[TILES][4];
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int e = 0; e < 4; e++) total[t][e] = acc[t][e] = 0.f;
    int stage = 0, chunk = first_chunk, buffer = 1;
    for (int turn = begin; turn < end; turn++) {
        while (turns * (chunk + 1) / CHUNKS <= turn) chunk++;
        wait_for_copies<STAGES - 2>();
        const int within = (turn - begin) % VECTOR_TURNS;
        if (within == 0) {
            __syncthreads();
            buffer ^= 1;
            if (turn + VECTOR_TURNS < end) copy_vectors(buffer ^ 1, turn + VECTOR_TURNS);
        } else {
            __syncwarp();
        }
        if (turn + STAGES - 1 < end) copy_weights(stage == 0 ? STAGES - 1 : stage - 1, turn + STAGES - 1);
        commit();
        const u32 from = base + buffer * VECTORS + (lane >> 2) * PITCH, held = own + stage * OWN_STAGE;
        uint4 piece[PIECES];
#pragma unroll
        for (int i = 0; i < PIECES; i++) piece[i] = read_shared(held + i * 512 + lane * 16);
        float part[TILES][4];
#pragma unroll
        for (int q = 0; q < 4; q++) {
            if (!WHOLE && turn * TURN + q * 32 >= k) break;
            const int column = within * 16 + q * 4 + (lane & 3);
            const u32 at = from + ((column ^ ((lane >> 2 & 1) << 2)) << 4);
            uint4 inputs[TILES];
#pragma unroll
            for (int t = 0; t < TILES; t++) inputs[t] = read_shared(at + t * 8 * PITCH);
            multiply(piece, q, inputs, part, acc,
                     [&](int group) { return read_shared_word(held + OWN_WORDS + group * 32 + (lane >> 2) * 4); });
        }
        if (turn + 1 == turns * (chunk + 1) / CHUNKS) {
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    total[t][e] += acc[t][e];
                    acc[t][e] = 0.f;
                }
        }
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    wait_for_copies<0>();
    __syncthreads();
    float* sums = (float*)memory;  // [TILES * 8][SUM_ROWS]
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            sums[(t * 8 + (lane & 3) * 2 + (e & 1)) * SUM_ROWS + warp * 16 + (lane >> 2) + (e >> 1) * 8] = total[t][e];
    __syncthreads();
    // A thread has four rows of a tile for one vector; BATCH such pieces at once, so that their loads overlap.
    constexpr int BATCH = 4;
#if SPLIT_BLOCKS
    const u64 a_matrix = (u64)TILES * 8 * width, a_split = a_matrix * MATRICES;
    for (int item = threadIdx.x; item < WARPS * TILES * 32; item += WARPS * 32) {
        const int row = item % 4 * 4, vector = item / 4 % (TILES * 8), tile_of = item / (TILES * 32);
        const int tile = blockIdx.x * output_tiles + tile_of % output_tiles;
        if (vector < batch && tile < tiles)
            __stcg((float4*)(partial + a_split * split + a_matrix * (tile_of / output_tiles) + (u64)vector * width + tile * 16 + row),
                   *(const float4*)(sums + vector * SUM_ROWS + tile_of * 16 + row));
    }
    __shared__ u32 order;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        order = atomicAdd(counters + blockIdx.x, 1u);
        if (order == SPLITS - 1) counters[blockIdx.x] = 0;
    }
    __syncthreads();
    if (order != SPLITS - 1) return;
    __threadfence();
#endif
    const Epilogue epilogue = {width IF_NORM(factors) IF_BIAS(bias) IF_RESIDUAL(residual) IF_ADAPTERS(adapters, adapter_of, low), y
                               IF_NEXT(next_weight, next_x, next_squares)};
    const int items = output_tiles * TILES * 32;
    for (int first = threadIdx.x; first < items; first += WARPS * 32 * BATCH) {
        float all[BATCH][MATRICES][4];
        uint2 added[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int item = first + i * WARPS * 32, row = item % 4 * 4, vector = item / 4 % (TILES * 8), tile_of = item / (TILES * 32);
            const int tile = blockIdx.x * output_tiles + tile_of;
            const bool use = item < items && vector < batch && tile < tiles;
            const u64 at = (u64)vector * width + tile * 16 + row;
#pragma unroll
            for (int m = 0; m < MATRICES; m++) {
                float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#if SPLIT_BLOCKS
#pragma unroll
                for (int s = 0; s < SPLITS; s++) {
                    if (!use) continue;
                    const float4 one = __ldcg((const float4*)(partial + a_split * s + a_matrix * m + at));
                    sum.x += one.x;
                    sum.y += one.y;
                    sum.z += one.z;
                    sum.w += one.w;
                }
#else
                if (item < items) sum = *(const float4*)(sums + vector * SUM_ROWS + (m * output_tiles + tile_of) * 16 + row);
#endif
                all[i][m][0] = sum.x;
                all[i][m][1] = sum.y;
                all[i][m][2] = sum.z;
                all[i][m][3] = sum.w;
            }
#if RESIDUAL
            if (use) added[i] = *(const uint2*)(residual + at);
#endif
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int item = first + i * WARPS * 32, row = item % 4 * 4, vector = item / 4 % (TILES * 8), tile_of = item / (TILES * 32);
            const int tile = blockIdx.x * output_tiles + tile_of;
            // Whole warps are past the end.
            if (item >= items) break;
            const Place of = place_of(min(tile, tiles - 1));
#if GATE
            epilogue.store_four(vector < batch && tile < tiles, of, tile, row, vector, all[i][0], all[i][1], added[i], scales1, p);
#else
            epilogue.store_four(vector < batch && tile < tiles, of, tile, row, vector, all[i][0], all[i][0], added[i], scales0, p);
#endif
        }
    }
}
