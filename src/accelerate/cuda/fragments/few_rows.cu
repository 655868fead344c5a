// Matmul of quantised weights with up to 16 vectors, limited by memory bandwidth: Y[B, N] = X[B, K] W[N, K]^T, bf16 in, f32 sums.
//
// A block owns 16 rows of W (with GATE 16 of each matrix), each of its BLOCK_WARPS warps one or two chunks of K. Fragments come straight
// from memory, a turn ahead, and are unpacked in registers (fragments.cuh); vectors come through L1. With OVERLAP
// the first weights are read before the vectors are written.
//
// On an H200, of the rate of a copy (4,250 GB/s; inside a graph, weights and scales counted, K 4,096 but for down), 8 bits and 4
// bits in groups of 64, one vector: q, k and v 72 and 54 %, output 63 and 48 %, gate and up 85 and 66 %, down 85 and 70 %, head
// 97 %. Eight vectors cost 2 to 8 % more than one, sixteen up to 30 % more (8 bits, gate and up and the head: more_rows.cu, 28.7 and 168 us). What 4 bits wait for is the ALU: shifts and lop3 of
// unpacking. 64 to 128 registers.
//
// Sources: the fragment layout after the PTX ISA, mma.m16n8k16; "(w & mask) | magic" after Kim et al. 2022, "Who Says Elephants
// Can't Run: Bringing Large Scale MoE Models into Cloud Scale Production".

#define WARPS BLOCK_WARPS
// Where the blocks are no more than two a processor (CHUNKS 16), registers are better spent on a longer loop body.
#define BLOCKS_A_PROCESSOR (CHUNKS == 16 ? 2 : TILES == 1 && !GATE ? 3 : BITS == 4 && !GATE ? 3 : 2)

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS_A_PROCESSOR) ENTRY(KERNEL_OPERANDS, const __grid_constant__ Parameters p) {
    __shared__ float sums[CHUNKS][MATRICES * TILES * 4][32];
#if NORM
    __shared__ float factors[TILES * 8];
#endif
    let_next_begin();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int k = (int)p.k, batch = (int)p.batch, tile = blockIdx.x;
    const int pieces = k / COLUMNS, turns = (k + TURN - 1) / TURN;
    int chunk = CHUNKS / WARPS * warp;
    const int chunks_end = chunk + CHUNKS / WARPS, begin = turns * chunk / CHUNKS, end = turns * chunks_end / CHUNKS;
    int width = (int)p.rows[0];
    Place place = {words0, scales0, 0, tile};
#if WEIGHTS > 1 && !GATE
    width += (int)p.rows[1];
    if (place.tile >= (int)p.rows[0] / 16) {
        place = {words1, scales1, 1, tile - (int)p.rows[0] / 16};
#if WEIGHTS > 2
        if (place.tile >= (int)p.rows[1] / 16) place = {words2, scales2, 2, place.tile - (int)p.rows[1] / 16};
#endif
    }
#endif
#if WEIGHTS > 2
    width += (int)p.rows[2];
#endif
    const uint4* words[MATRICES];
    const Scale* scales[MATRICES];
    words[0] = place.words;
    scales[0] = place.scales;
#if GATE
    words[1] = words1;
    scales[1] = scales1;
#endif
#pragma unroll
    for (int m = 0; m < MATRICES; m++) {
        words[m] += ((u64)place.tile * pieces + begin * PIECES) * 32 + lane;
#if BITS == 4
        scales[m] += (u64)place.tile * (k / GROUP) * 8 + begin * GROUPS * 8 + lane;
#endif
    }

    uint4 now[MATRICES][PIECES], next[MATRICES][PIECES];
    u32 scales_now[MATRICES], scales_next[MATRICES];
    auto read = [&](int turn, uint4 (&to)[MATRICES][PIECES], u32 (&scales_to)[MATRICES]) {
#pragma unroll
        for (int m = 0; m < MATRICES; m++) {
#pragma unroll
            for (int i = 0; i < PIECES; i++)
                if (WHOLE || turn * PIECES + i < pieces) to[m][i] = read_once(words[m] + i * 32);
#if BITS == 4
            // A pair of scales for each of 8 rows and group of the turn.
            scales_to[m] = 0;
            if (GROUPS * 8 == 32 || lane < GROUPS * 8)
                if (WHOLE || turn * TURN + (lane >> 3) * GROUP < k)
                    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(scales_to[m]) : "l"(scales[m]));
            scales[m] += GROUPS * 8;
#endif
            words[m] += PIECES * 32;
        }
    };
    if (begin < end) read(begin, now, scales_now);
    wait_for_last();
#if NORM
    norm_factors<WARPS>(squares, factors, p);
#endif
    const u16* vectors[TILES];
#pragma unroll
    for (int t = 0; t < TILES; t++) vectors[t] = x + (u64)min(t * 8 + (lane >> 2), batch - 1) * k + begin * TURN + (lane & 3) * 8;
    float acc[MATRICES][TILES][4];
#pragma unroll
    for (int m = 0; m < MATRICES; m++)
#pragma unroll
        for (int t = 0; t < TILES; t++) acc[m][t][0] = acc[m][t][1] = acc[m][t][2] = acc[m][t][3] = 0.f;

    auto keep = [&]() {
#pragma unroll
        for (int m = 0; m < MATRICES; m++)
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    sums[chunk][(m * TILES + t) * 4 + e][lane] = acc[m][t][e];
                    acc[m][t][e] = 0.f;
                }
        chunk++;
    };
    for (int turn = begin; turn < end; turn++) {
        while (CHUNKS > WARPS && turn >= turns * (chunk + 1) / CHUNKS) keep();
        uint4 inputs[4][TILES];
#pragma unroll
        for (int q = 0; q < 4; q++)
#pragma unroll
            for (int t = 0; t < TILES; t++)
                if (WHOLE || turn * TURN + q * 32 < k) inputs[q][t] = *(const uint4*)(vectors[t] + q * 32);
#pragma unroll
        for (int t = 0; t < TILES; t++) vectors[t] += TURN;
        if (turn + 1 < end) read(turn + 1, next, scales_next);
        float part[MATRICES][TILES][4];
#pragma unroll
        for (int q = 0; q < 4; q++) {
            if (!WHOLE && turn * TURN + q * 32 >= k) break;
#pragma unroll
            for (int m = 0; m < MATRICES; m++)
                multiply(now[m], q, inputs[q], part[m], acc[m],
                         [&](int group) { return __shfl_sync(~0u, scales_now[m], group * 8 + (lane >> 2)); });
        }
#pragma unroll
        for (int m = 0; m < MATRICES; m++) {
            scales_now[m] = scales_next[m];
#pragma unroll
            for (int i = 0; i < PIECES; i++) now[m][i] = next[m][i];
        }
    }
    while (chunk < chunks_end) keep();
    __syncthreads();

    const Epilogue epilogue = {width IF_NORM(factors) IF_BIAS(bias) IF_RESIDUAL(residual) IF_ADAPTERS(adapters, adapter_of, low), y
                               IF_NEXT(next_weight, next_x, next_squares)};
    // Element e of a lane: row lane / 4 + 8 (e / 2) of W, vector 2 (lane % 4) + e % 2 of the tile.
    for (int item = threadIdx.x; item < TILES * 128; item += WARPS * 32) {
        const int row = item & 15, column = (item >> 4) & 7, t = item >> 7;
        const int e = (row >> 3) * 2 + (column & 1), from = (row & 7) * 4 + (column >> 1);
        float total[2] = {0.f, 0.f};
#pragma unroll
        for (int m = 0; m < MATRICES; m++)
#pragma unroll
            for (int split = 0; split < SPLITS; split++) {
                float sum = 0.f;
#pragma unroll
                for (int chunk = 0; chunk < CHUNKS / SPLITS; chunk++)
                    sum += sums[split * (CHUNKS / SPLITS) + chunk][(m * TILES + t) * 4 + e][from];
                total[m] += sum;
            }
        const int vector = t * 8 + column;
#if GATE
        epilogue.store(vector < batch, place, tile, row, vector, total[0], total[1], scales1, p);
#else
        epilogue.store(vector < batch, place, tile, row, vector, total[0], 0.f, scales0, p);
#endif
    }
}
