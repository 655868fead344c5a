// Skinny matmul, a matrix times a few vectors, limited by memory bandwidth: Y[B, N] = X[B, K] W[N, K]^T, B up to 64,
// bf16 in, f32 sums on the tensor cores.
//
// 16 rows of W are the tall side of mma m16n8k16, eight vectors the narrow one. A block owns 16 rows
// (with GATE 16 of each matrix); its warps take 32 * DEPTH columns each in rotation and read fragments
// straight from memory: the k order inside 32 columns is permuted alike for both operands, so that a
// lane's 16 bytes feed two mma. Warps add their sums in shared memory, in a fixed order; a warp's
// columns and their order do not depend on the configuration, so a vector's result is the same bit for
// bit whatever the size of its batch.
//
// Configuration: TILES (vectors / 8, rounded up), WEIGHTS 1 to 3, GATE, RESIDUAL, OUT_F32 as in
// gemv.cu; ADAPTERS (each vector may have its own low-rank terms: adapter.cuh); BLOCK_WARPS, 4,
// or 8 where there are few blocks; WHOLE: K is a multiple of 32 * DEPTH, so that the loop has no bounds
// check. K is a multiple of 32, the rows of each matrix a multiple of 16.
//
// Source: fragments after the PTX ISA, mma.m16n8k16.
// On an H100 (Nsight Compute), of the memory's rate, for 8, 32 and 64 vectors: head 91, 86 and 69 %; gate and up 86, 81 and
// 68 %; q, k and v 74, 70 and 54 %; output 68, 63 and 50 %. What grows with the batch is the reading of the vectors, again for
// every 16 rows: L1 is at 30, 61 and 80 % in the head. 120 to 168 registers.

#define WARPS BLOCK_WARPS
#define MATRICES (GATE ? 2 : 1)
#define DEPTH 4
// With more warps on a processor there are fewer registers, and so fewer loads in flight.
#define BLOCKS_A_PROCESSOR (WARPS == 8 ? 2 : 3)

struct Parameters {
    u64 k;
    u64 rows[3];
    u64 batch;
#if ADAPTERS
    AdapterPlace adapter;
#endif
};

__device__ __forceinline__ uint4 read_once(const u16* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS_A_PROCESSOR)
ENTRY(const u16* x, const u16* w0,
#if WEIGHTS > 1
      const u16* w1,
#endif
#if WEIGHTS > 2
      const u16* w2,
#endif
#if RESIDUAL
      const u16* residual,
#endif
#if ADAPTERS
      const AdapterMatrix* adapters, const int* adapter_of, const float* low,
#endif
#if OUT_F32
      float* y,
#else
      u16* y,
#endif
      const __grid_constant__ Parameters p) {
    __shared__ float sums[MATRICES * TILES * 4][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int lane_row = lane >> 2, lane_column = (lane & 3) * 8;
    const int k_end = (int)p.k, batch = (int)p.batch;
    const int first = blockIdx.x * 16;
    const u16* matrix[MATRICES];
    int width = (int)p.rows[0];
    int within = first, which = 0;
#if GATE
    matrix[0] = w0 + (u64)first * p.k;
    matrix[1] = w1 + (u64)first * p.k;
#else
    {
        const u16* chosen = w0;
#if WEIGHTS > 1
        width += (int)p.rows[1];
        if (within >= (int)p.rows[0]) {
            within -= (int)p.rows[0];
            chosen = w1;
            which = 1;
#if WEIGHTS > 2
            if (within >= (int)p.rows[1]) {
                within -= (int)p.rows[1];
                chosen = w2;
                which = 2;
            }
#endif
        }
#endif
#if WEIGHTS > 2
        width += (int)p.rows[2];
#endif
        matrix[0] = chosen + (u64)within * p.k;
    }
#endif
    float acc[MATRICES][TILES][4];
#pragma unroll
    for (int m = 0; m < MATRICES; m++)
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[m][t][e] = 0.f;

    for (int base = warp * 32 * DEPTH; base < k_end; base += WARPS * 32 * DEPTH) {
        uint4 weights[DEPTH][MATRICES][2];
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
#pragma unroll
            for (int m = 0; m < MATRICES; m++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    if (WHOLE || base + d * 32 < k_end)
                        weights[d][m][h] = read_once(matrix[m] + (u64)(h * 8 + lane_row) * p.k + base + d * 32 + lane_column);
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            if (!WHOLE && base + d * 32 >= k_end) break;
            uint4 vectors[TILES];
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const int vector = min(t * 8 + lane_row, batch - 1);
                vectors[t] = *(const uint4*)(x + (u64)vector * p.k + base + d * 32 + lane_column);
            }
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const uint4 b = vectors[t];
#pragma unroll
                for (int m = 0; m < MATRICES; m++) {
                    const uint4 upper = weights[d][m][0], lower = weights[d][m][1];
                    mma(acc[m][t], upper.x, lower.x, upper.y, lower.y, b.x, b.y);
                    mma(acc[m][t], upper.z, lower.z, upper.w, lower.w, b.z, b.w);
                }
            }
        }
    }
    for (int turn = WARPS - 1; turn >= 0; turn--) {
        if (warp == turn) {
#pragma unroll
            for (int m = 0; m < MATRICES; m++)
#pragma unroll
                for (int t = 0; t < TILES; t++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        float& sum = sums[(m * TILES + t) * 4 + e][lane];
                        if (turn < WARPS - 1) acc[m][t][e] += sum;
                        sum = acc[m][t][e];
                    }
        }
        __syncthreads();
    }
    // Element e of a lane: row lane / 4 + 8 (e / 2) of W, vector 2 (lane % 4) + e % 2 of the tile.
    for (int item = threadIdx.x; item < TILES * 128; item += WARPS * 32) {
        const int from = item & 31, e = item / 32 % 4, t = item / 128;
        const int vector = t * 8 + (from & 3) * 2 + (e & 1);
        if (vector >= batch) continue;
        const int row = (from >> 2) + (e >> 1) * 8;
        float value = sums[t * 4 + e][from];
#if GATE
        float second = sums[(TILES + t) * 4 + e][from];
#endif
#if ADAPTERS
        if (adapter_of[vector] >= 0) {
            const AdapterMatrix* matrices = adapters + (u64)adapter_of[vector] * p.adapter.matrices + p.adapter.first;
            const float* lows = low + ((u64)vector * ADAPTER_SHARES + which) * ADAPTER_RANK;
            value = adapted(value, matrices[which], lows, within + row);
#if GATE
            second = adapted(second, matrices[1], lows + ADAPTER_RANK, within + row);
#endif
        }
#endif
#if GATE
        value = value / (1.f + __expf(-value)) * second;
#endif
        const u64 at = (u64)vector * width + first + row;
#if RESIDUAL
        value += bf16_to_float(residual[at]);
#endif
#if OUT_F32
        y[at] = value;
#else
        y[at] = (u16)pack_bf16(value, 0.f);
#endif
    }
}
