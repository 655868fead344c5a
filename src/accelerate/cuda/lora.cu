// The low-rank side of adapted linear layers (LoRA): skinny matmuls that read
// their large operand once. bf16 operands, f32 sums. RANK is a multiple of 8.
//
// Configuration: RANK, ADAPTERS (how many adapters share the input), DROPOUT, and one of
// LOW_RANK_DOWN, LOW_RANK_FLOW, LOW_RANK_OUTER, LOW_RANK_SPREAD, SUM_FLOW, SUM_OUTER, SCALE_CAST,
// MASK_FILL. Limit: memory; with three masks to draw, arithmetic.
//
// The large operand goes straight from memory into registers: a lane reads 16 bytes, eight columns
// of one row; a warp eight rows of 32 columns. Each of the four registers then is, over the warp, an
// 8 x 8 matrix of an mma whose columns are permuted: its column 2q + e is column 8q + 2i + e of
// the 32 in register i. Where the matmul sums over rows, that matrix is transposed in registers.
//
// Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; fragments after the PTX ISA, mma.m16n8k16.
//
// On an H100 (Nsight Compute, 5,888 rows, rank 8; memory's rate for one adapter, then instructions for three with their
// masks): DOWN 57 and 67 %, FLOW 65 to 75 %, OUTER 78 and 65 %, SPREAD 56 and 67 %, with the gate's backward 66 %. The sums
// and casts are 3 to 15 us of launch and latency. Registers 78 to 136, sums 32 to 40.

struct Parameters {
    u64 rows, width;
    u64 chunk;   // rows of one block's part; SUM_FLOW, SUM_OUTER: number of parts
    u64 scale;   // f32 bits
    u64 seeds[3];
    u64 threshold;
    u64 keep_scale;  // f32 bits
    u64 low_parts;   // SUM_FLOW: number of parts of `low`
};

__device__ __forceinline__ Mask mask_of(const Parameters& p, int adapter) {
    Mask mask;
    mask.seed_low = (u32)p.seeds[adapter];
    mask.seed_high = (u32)(p.seeds[adapter] >> 32);
    mask.threshold = (u32)p.threshold;
    mask.scale = __uint_as_float((u32)p.keep_scale);
    return mask;
}

__device__ __forceinline__ void mma_16x8x16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_16x8x8(float (&c)[4], u32 a0, u32 a1, u32 b0) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
}

// The 8 x 8 matrix that a register holds over a warp, transposed.
__device__ __forceinline__ u32 transposed(u32 matrix) {
    u32 out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(matrix));
    return out;
}

__device__ __forceinline__ u32 word(const uint4& vector, int at) {
    return at == 0 ? vector.x : at == 1 ? vector.y : at == 2 ? vector.z : vector.w;
}

#define TILES (RANK / 8)

// Parameters of the adapters of a launch.
#if ADAPTERS == 1
#define EACH_ADAPTER(type, name) type name##0
#define LIST(name) {name##0}
#elif ADAPTERS == 2
#define EACH_ADAPTER(type, name) type name##0, type name##1
#define LIST(name) {name##0, name##1}
#else
#define EACH_ADAPTER(type, name) type name##0, type name##1, type name##2
#define LIST(name) {name##0, name##1, name##2}
#endif

#if LOW_RANK_DOWN
// low_i = drop_i(x) A_i^T * scale: x [rows, width] bf16, A_i [RANK, width] f32, low_i [rows, RANK] bf16.
//
// A block owns 16 x ROW_TILES rows; its 16 warps take 32 columns each in rotation. The k order inside 32
// columns is permuted alike for both operands, so that a lane's 16 bytes feed two mma.
// Registers: ROW_TILES x ADAPTERS x RANK / 8 accumulators; shared memory: their sums over warps.
#define ROWS (16 * ROW_TILES)
extern "C" __global__ void __launch_bounds__(512)
ENTRY(const u16* x, EACH_ADAPTER(const float*, a), EACH_ADAPTER(u16*, low), const __grid_constant__ Parameters p) {
    const float* a[ADAPTERS] = LIST(a);
    u16* low[ADAPTERS] = LIST(low);
    __shared__ float sums[ROWS][ADAPTERS * RANK];
    const int rows = (int)p.rows, width = (int)p.width;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int lane_row = lane >> 2, lane_column = (lane & 3) * 8;
    const int first_row = blockIdx.x * ROWS;
    for (int i = threadIdx.x; i < ROWS * ADAPTERS * RANK; i += 512) (&sums[0][0])[i] = 0.f;
    __syncthreads();

    float acc[ROW_TILES][ADAPTERS][TILES][4];
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int i = 0; i < ADAPTERS; i++)
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[m][i][t][e] = 0.f;

    for (int k = warp * 32 + lane_column; k < width; k += 512) {
        uint4 input[ROW_TILES][2];
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = min(first_row + m * 16 + h * 8 + lane_row, rows - 1);
                input[m][h] = *(const uint4*)(x + (u64)row * width + k);
            }
#pragma unroll
        for (int i = 0; i < ADAPTERS; i++) {
            uint4 masked[ROW_TILES][2];
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    masked[m][h] = input[m][h];
#if DROPOUT
                    const Mask mask = mask_of(p, i);
                    const u32 pair = ((u32)(first_row + m * 16 + h * 8 + lane_row) * (u32)width + k) >> 1;
                    masked[m][h].x = drop_pair(masked[m][h].x, pair, mask);
                    masked[m][h].y = drop_pair(masked[m][h].y, pair + 1, mask);
                    masked[m][h].z = drop_pair(masked[m][h].z, pair + 2, mask);
                    masked[m][h].w = drop_pair(masked[m][h].w, pair + 3, mask);
#endif
                }
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const float* from = a[i] + (u64)(t * 8 + lane_row) * width + k;
                const float4 left = *(const float4*)from, right = *(const float4*)(from + 4);
                const u32 b0 = pack_bf16(left.x, left.y), b1 = pack_bf16(left.z, left.w);
                const u32 b2 = pack_bf16(right.x, right.y), b3 = pack_bf16(right.z, right.w);
#pragma unroll
                for (int m = 0; m < ROW_TILES; m++) {
                    mma_16x8x16(acc[m][i][t], masked[m][0].x, masked[m][1].x, masked[m][0].y, masked[m][1].y, b0, b1);
                    mma_16x8x16(acc[m][i][t], masked[m][0].z, masked[m][1].z, masked[m][0].w, masked[m][1].w, b2, b3);
                }
            }
        }
    }
    // Warps add their partial sums one after another: the order of the sum is fixed.
    for (int turn = 0; turn < 16; turn++) {
        if (warp == turn) {
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
                for (int i = 0; i < ADAPTERS; i++)
#pragma unroll
                    for (int t = 0; t < TILES; t++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            sums[m * 16 + (e >> 1) * 8 + lane_row][i * RANK + t * 8 + (lane & 3) * 2 + (e & 1)] += acc[m][i][t][e];
        }
        __syncthreads();
    }
    float scale = __uint_as_float((u32)p.scale);
#if DROPOUT
    scale *= __uint_as_float((u32)p.keep_scale);
#endif
    for (int i = threadIdx.x; i < ROWS * ADAPTERS * RANK / 2; i += 512) {
        const int row = i / (ADAPTERS * RANK / 2), column = i % (ADAPTERS * RANK / 2) * 2;
        if (first_row + row >= rows) continue;
        const u32 packed = pack_bf16(sums[row][column] * scale, sums[row][column + 1] * scale);
        *(u32*)(low[column / RANK] + (u64)(first_row + row) * RANK + column % RANK) = packed;
    }
}
#endif

#if LOW_RANK_FLOW || LOW_RANK_OUTER || LOW_RANK_SPREAD
// A warp's columns: COLUMN_TILES times 32. A block has four warps side by side.
#define WARP_COLUMNS (32 * COLUMN_TILES)

// Two sets of eight rows of the warp's columns; elements outside are zero.
__device__ __forceinline__ void load_rows(const u16* x, int row, int end, int column, int width,
                                          uint4 (&into)[COLUMN_TILES][2]) {
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const bool inside = row + h * 8 < end && column + c * 32 < width;
            into[c][h] = inside ? *(const uint4*)(x + (u64)(row + h * 8) * width + column + c * 32)
                                : make_uint4(0, 0, 0, 0);
        }
}

// Two columns of eight rows of `low` [rows, RANK], from which an mma takes one k step.
__device__ __forceinline__ u32 low_pair(const u16* low, int row, int end, int column) {
    return *(const u32*)(low + (u64)min(row, end - 1) * RANK + column);
}
#endif

#if LOW_RANK_FLOW
// The gradients of one adapter's B and of x A^T, dy [rows, width] read once:
//   low_part[block column, row, :] = dy[row, columns] (scale B)[columns, :],
//   b_part[chunk, column, :] = scale * sum over the chunk's rows of dy[row, column] low[row, :],
// B [width, RANK] f32, low [rows, RANK] bf16, both parts f32. SUM_FLOW adds the parts up, in order.
#define ROW_STEPS (TILES >= 4 ? 1 : 4 / TILES)
extern "C" __global__ void __launch_bounds__(128)
ENTRY(const u16* dy, const u16* low, const float* b, float* low_part, float* b_part,
      const __grid_constant__ Parameters p) {
    __shared__ float staged[4][ROW_STEPS * 16][RANK];
    const int rows = (int)p.rows, width = (int)p.width;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int lane_row = lane >> 2, quad = lane & 3;
    const int column = (blockIdx.x * 4 + warp) * WARP_COLUMNS + quad * 8;
    const int first = blockIdx.y * (int)p.chunk, end = min(first + (int)p.chunk, rows);
    const float scale = __uint_as_float((u32)p.scale);

    u32 factor[COLUMN_TILES][TILES][4];
    float acc[COLUMN_TILES][2][TILES][4];
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            const bool inside = column + c * 32 < width;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* from = b + (u64)(column + c * 32 + 2 * i) * RANK + t * 8 + lane_row;
                factor[c][t][i] = inside ? pack_bf16(from[0] * scale, from[RANK] * scale) : 0u;
                acc[c][0][t][i] = acc[c][1][t][i] = 0.f;
            }
        }

    uint4 next[COLUMN_TILES][2];
    load_rows(dy, first + lane_row, end, column, width, next);
    for (int base = first; base < end; base += 16 * ROW_STEPS) {
#pragma unroll
        for (int step = 0; step < ROW_STEPS; step++) {
            const int row = base + step * 16;
            uint4 now[COLUMN_TILES][2];
#pragma unroll
            for (int c = 0; c < COLUMN_TILES; c++) {
                now[c][0] = next[c][0];
                now[c][1] = next[c][1];
            }
            load_rows(dy, row + 16 + lane_row, end, column, width, next);
            float gradient[TILES][4];
#pragma unroll
            for (int t = 0; t < TILES; t++) {
#pragma unroll
                for (int e = 0; e < 4; e++) gradient[t][e] = 0.f;
                const u32 top = transposed(low_pair(low, row + lane_row, rows, t * 8 + quad * 2));
                const u32 bottom = transposed(low_pair(low, row + 8 + lane_row, rows, t * 8 + quad * 2));
#pragma unroll
                for (int c = 0; c < COLUMN_TILES; c++) {
                    const uint4 upper = now[c][0], lower = now[c][1];
                    mma_16x8x16(gradient[t], upper.x, lower.x, upper.y, lower.y, factor[c][t][0], factor[c][t][1]);
                    mma_16x8x16(gradient[t], upper.z, lower.z, upper.w, lower.w, factor[c][t][2], factor[c][t][3]);
                    mma_16x8x16(acc[c][0][t], transposed(upper.x), transposed(upper.y), transposed(lower.x),
                                transposed(lower.y), top, bottom);
                    mma_16x8x16(acc[c][1][t], transposed(upper.z), transposed(upper.w), transposed(lower.z),
                                transposed(lower.w), top, bottom);
                }
                float* to = &staged[warp][step * 16 + lane_row][t * 8 + quad * 2];
                *(float2*)to = make_float2(gradient[t][0], gradient[t][1]);
                *(float2*)(to + 8 * RANK) = make_float2(gradient[t][2], gradient[t][3]);
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < ROW_STEPS * 16 * RANK; i += 128) {
            const int row = base + i / RANK;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < 4; w++) sum += (&staged[w][0][0])[i];
            if (row < end) low_part[((u64)blockIdx.x * rows + row) * RANK + i % RANK] = sum;
        }
        __syncthreads();
    }
    // Rows of an mma's result are columns of dy, in the order the registers gave them.
    const int own = column - quad * 8 + (lane_row >> 1) * 8 + (lane_row & 1);
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; c++) {
        if (column + c * 32 >= width) continue;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const float* sum = acc[c][half][t];
                float* to = b_part + ((u64)blockIdx.y * width + own + c * 32 + half * 4) * RANK + t * 8 + quad * 2;
                *(float2*)to = make_float2(sum[0] * scale, sum[1] * scale);
                *(float2*)(to + 2 * RANK) = make_float2(sum[2] * scale, sum[3] * scale);
            }
    }
}
#endif

#if LOW_RANK_OUTER
// part[chunk, adapter, column, :] = sum over the chunk's rows of drop_i(x)[row, column] low_i[row, :],
// x [rows, width] bf16 read once for all adapters, low_i [rows, RANK] bf16. SUM_OUTER adds the parts
// up, in order.
extern "C" __global__ void __launch_bounds__(128)
ENTRY(const u16* x, EACH_ADAPTER(const u16*, low), float* part, const __grid_constant__ Parameters p) {
    const u16* low[ADAPTERS] = LIST(low);
    const int rows = (int)p.rows, width = (int)p.width;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int lane_row = lane >> 2, quad = lane & 3;
    const int column = (blockIdx.x * 4 + warp) * WARP_COLUMNS + quad * 8;
    const int first = blockIdx.y * (int)p.chunk, end = min(first + (int)p.chunk, rows);

    float acc[ADAPTERS][COLUMN_TILES][2][TILES][4];
#pragma unroll
    for (int i = 0; i < ADAPTERS; i++)
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[i][c][0][t][e] = acc[i][c][1][t][e] = 0.f;

    uint4 next[COLUMN_TILES][2];
    load_rows(x, first + lane_row, end, column, width, next);
    for (int row = first; row < end; row += 16) {
        uint4 now[COLUMN_TILES][2];
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++) {
            now[c][0] = next[c][0];
            now[c][1] = next[c][1];
        }
        load_rows(x, row + 16 + lane_row, end, column, width, next);
#if !DROPOUT
        u32 matrix[COLUMN_TILES][2][4];
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int w = 0; w < 4; w++) matrix[c][h][w] = transposed(word(now[c][h], w));
#endif
#pragma unroll
        for (int i = 0; i < ADAPTERS; i++) {
#if DROPOUT
            const Mask mask = mask_of(p, i);
            u32 matrix[COLUMN_TILES][2][4];
#pragma unroll
            for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const u32 pair = ((u32)(row + h * 8 + lane_row) * (u32)width + column + c * 32) >> 1;
#pragma unroll
                    for (int w = 0; w < 4; w++) matrix[c][h][w] = transposed(drop_pair(word(now[c][h], w), pair + w, mask));
                }
#endif
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const u32 top = transposed(low_pair(low[i], row + lane_row, rows, t * 8 + quad * 2));
                const u32 bottom = transposed(low_pair(low[i], row + 8 + lane_row, rows, t * 8 + quad * 2));
#pragma unroll
                for (int c = 0; c < COLUMN_TILES; c++) {
                    const auto& m = matrix[c];
                    mma_16x8x16(acc[i][c][0][t], m[0][0], m[0][1], m[1][0], m[1][1], top, bottom);
                    mma_16x8x16(acc[i][c][1][t], m[0][2], m[0][3], m[1][2], m[1][3], top, bottom);
                }
            }
        }
    }
    float scale = __uint_as_float((u32)p.scale);
#if DROPOUT
    scale *= __uint_as_float((u32)p.keep_scale);
#endif
    const int own = column - quad * 8 + (lane_row >> 1) * 8 + (lane_row & 1);
#pragma unroll
    for (int i = 0; i < ADAPTERS; i++)
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++) {
            if (column + c * 32 >= width) continue;
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    const float* sum = acc[i][c][half][t];
                    const u64 place = ((u64)blockIdx.y * ADAPTERS + i) * width + own + c * 32 + half * 4;
                    float* to = part + place * RANK + t * 8 + quad * 2;
                    *(float2*)to = make_float2(sum[0] * scale, sum[1] * scale);
                    *(float2*)(to + 2 * RANK) = make_float2(sum[2] * scale, sum[3] * scale);
                }
        }
}
#endif

#if SUM_FLOW || SUM_OUTER
// Four neighbours of the sum of `parts` parts of `count` elements.
__device__ __forceinline__ float4 sum_parts(const float* part, u64 at, u64 count, u64 parts) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
    for (u64 i = 0; i < parts; i++) {
        const float4 one = *(const float4*)(part + i * count + at);
        sum.x += one.x;
        sum.y += one.y;
        sum.z += one.z;
        sum.w += one.w;
    }
    return sum;
}
#endif

#if SUM_FLOW
// The two results of LOW_RANK_FLOW: b [width, RANK] f32 and low [rows, RANK] bf16.
extern "C" __global__ void __launch_bounds__(128)
ENTRY(const float* b_part, const float* low_part, float* b, u16* low, const __grid_constant__ Parameters p) {
    u64 at = ((u64)blockIdx.x * 128 + threadIdx.x) * 4;
    const u64 of_b = p.width * RANK, of_low = p.rows * RANK;
    if (at < of_b) {
        *(float4*)(b + at) = sum_parts(b_part, at, of_b, p.chunk);
    } else if (at - of_b < of_low) {
        at -= of_b;
        const float4 sum = sum_parts(low_part, at, of_low, p.low_parts);
        *(uint2*)(low + at) = make_uint2(pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
    }
}
#endif

#if SUM_OUTER
// The results of LOW_RANK_OUTER, transposed: a_i [RANK, width] f32. Neighbouring threads write
// neighbouring columns.
extern "C" __global__ void __launch_bounds__(128)
ENTRY(const float* part, EACH_ADAPTER(float*, a), const __grid_constant__ Parameters p) {
    float* a[ADAPTERS] = LIST(a);
    const u64 at = (u64)blockIdx.x * 128 + threadIdx.x;
    if (at >= p.width * (RANK / 4)) return;
    const u64 column = at % p.width, row = at / p.width * 4;
    const u64 one = p.width * RANK;
    const float4 sum = sum_parts(part + blockIdx.y * one, column * RANK + row, one * ADAPTERS, p.chunk);
#pragma unroll
    for (int i = 0; i < ADAPTERS; i++)
        if (blockIdx.y == i) {
            float* to = a[i] + row * p.width + column;
            to[0] = sum.x;
            to[p.width] = sum.y;
            to[2 * p.width] = sum.z;
            to[3 * p.width] = sum.w;
        }
}
#endif

#if LOW_RANK_SPREAD
// dx += sum over adapters of drop_i(low_i A_i): dx [rows, width] bf16, low_i [rows, RANK] bf16,
// A_i [RANK, width] f32; in place, or with SWIGLU on to the gradients of gate and up of
// SwiGLU, silu(gate) * up, where dx is the gradient of its output.
extern "C" __global__ void __launch_bounds__(128)
ENTRY(EACH_ADAPTER(const u16*, low), EACH_ADAPTER(const float*, a), u16* dx,
#if SWIGLU
      const u16* gate, const u16* up, u16* dgate, u16* dup,
#endif
      const __grid_constant__ Parameters p) {
    const u16* low[ADAPTERS] = LIST(low);
    const float* a[ADAPTERS] = LIST(a);
    const int rows = (int)p.rows, width = (int)p.width;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int lane_row = lane >> 2, quad = lane & 3;
    const int first_column = (blockIdx.x * 4 + warp) * WARP_COLUMNS;
    const int column = first_column + quad * 8;
    const int first = blockIdx.y * (int)p.chunk, end = min(first + (int)p.chunk, rows);
    if (first_column >= width) return;

    // Column n of the mma in register w is the lane's column that w holds.
    u32 factor[ADAPTERS][COLUMN_TILES][4][TILES];
#pragma unroll
    for (int i = 0; i < ADAPTERS; i++)
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
            for (int w = 0; w < 4; w++)
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    const int of = first_column + c * 32 + (lane_row >> 1) * 8 + (lane_row & 1) + 2 * w;
                    const float* from = a[i] + (u64)(t * 8 + quad * 2) * width + of;
                    factor[i][c][w][t] = of < width ? pack_bf16(from[0], from[width]) : 0u;
                }

    uint4 next[COLUMN_TILES][2];
    load_rows(dx, first + lane_row, end, column, width, next);
    for (int row = first; row < end; row += 16) {
        uint4 now[COLUMN_TILES][2];
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++) {
            now[c][0] = next[c][0];
            now[c][1] = next[c][1];
        }
        load_rows(dx, row + 16 + lane_row, end, column, width, next);
        u32 share[ADAPTERS][TILES][2];
#pragma unroll
        for (int i = 0; i < ADAPTERS; i++)
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    share[i][t][h] = low_pair(low[i], row + h * 8 + lane_row, rows, t * 8 + quad * 2);
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++) {
            if (first_column + c * 32 >= width) continue;
            float gradient[2][8];
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int w = 0; w < 4; w++) {
                    gradient[h][2 * w] = low_half(word(now[c][h], w));
                    gradient[h][2 * w + 1] = high_half(word(now[c][h], w));
                }
#pragma unroll
            for (int i = 0; i < ADAPTERS; i++) {
#if DROPOUT
                const Mask mask = mask_of(p, i);
#endif
#pragma unroll
                for (int w = 0; w < 4; w++) {
                    float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                    for (int t = 0; t < TILES; t++) mma_16x8x8(sum, share[i][t][0], share[i][t][1], factor[i][c][w][t]);
#pragma unroll
                    for (int h = 0; h < 2; h++) {
#if DROPOUT
                        const u32 pair = (((u32)(row + h * 8 + lane_row) * (u32)width + column + c * 32) >> 1) + w;
                        const u32 bits = mask_bits(pair, mask);
                        if (keeps_low(bits, mask)) gradient[h][2 * w] += sum[2 * h] * mask.scale;
                        if (keeps_high(bits, mask)) gradient[h][2 * w + 1] += sum[2 * h + 1] * mask.scale;
#else
                        gradient[h][2 * w] += sum[2 * h];
                        gradient[h][2 * w + 1] += sum[2 * h + 1];
#endif
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if (row + h * 8 + lane_row >= end) continue;
                const u64 place = (u64)(row + h * 8 + lane_row) * width + column + c * 32;
#if SWIGLU
                float g[VECTOR], u[VECTOR];
                load_vector(gate + place, g);
                load_vector(up + place, u);
#pragma unroll
                for (int j = 0; j < VECTOR; j++) swiglu_backward(g[j], u[j], gradient[h][j]);
                store_vector(dgate + place, g);
                store_vector(dup + place, u);
#else
                store_vector(dx + place, gradient[h]);
#endif
            }
        }
    }
}
#endif

#if SCALE_CAST
// B [width, RANK] f32 -> scale * B, bf16.
extern "C" __global__ void __launch_bounds__(256)
ENTRY(const float* b, u16* cast, const __grid_constant__ Parameters p) {
    const u64 at = ((u64)blockIdx.x * 256 + threadIdx.x) * 4;
    if (at >= p.width * RANK) return;
    const float scale = __uint_as_float((u32)p.scale);
    const float4 value = *(const float4*)(b + at);
    *(uint2*)(cast + at) = make_uint2(pack_bf16(value.x * scale, value.y * scale), pack_bf16(value.z * scale, value.w * scale));
}
#endif

#if MASK_FILL
// The mask itself, f32: what the plain operations multiply with.
extern "C" __global__ void __launch_bounds__(256)
ENTRY(float* out, const __grid_constant__ Parameters p) {
    const u64 pair = (u64)blockIdx.x * 256 + threadIdx.x;
    if (pair * 2 >= p.rows * p.width) return;
    const Mask mask = mask_of(p, 0);
    // Places wrap at 2^32, as where rows and columns are multiplied.
    const u32 bits = mask_bits((u32)pair & 0x7fffffffu, mask);
    out[pair * 2] = keeps_low(bits, mask) ? mask.scale : 0.f;
    if (pair * 2 + 1 < p.rows * p.width) out[pair * 2 + 1] = keeps_high(bits, mask) ? mask.scale : 0.f;
}
#endif
