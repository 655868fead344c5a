// The low-rank side of adapted linear layers: products that are thin in one direction and read
// their large operand once. bf16 operands, f32 sums. RANK is a multiple of 8.
//
// Configuration: RANK, ADAPTERS (how many adapters share the input), DROPOUT, and one of
// LOW_RANK_DOWN, LOW_RANK_OUTER, LOW_RANK_SPREAD, SCALE_CAST, MASK_FILL. Limit: memory.

struct Parameters {
    u64 rows, width;
    u64 chunk;   // rows of one block's share, LOW_RANK_OUTER and LOW_RANK_SPREAD
    u64 scale;   // f32 bits
    u64 seeds[3];
    u64 threshold;
    u64 keep_scale;  // f32 bits
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

#if LOW_RANK_DOWN
// low_i = drop_i(x) A_i^T * scale: x [rows, width] bf16, A_i [RANK, width] f32, low_i [rows, RANK] bf16.
//
// A block owns 32 rows; its 8 warps take turns at 32 columns. The k order inside 32 columns is
// permuted alike for both operands, so that a lane's 16 consecutive bytes feed two products.
// Registers: 2 row tiles x ADAPTERS x RANK / 8 accumulators; shared memory: their sums over warps.
#define TILES (RANK / 8)
extern "C" __global__ void __launch_bounds__(256)
ENTRY(const u16* x, const float* a0
#if ADAPTERS > 1
      , const float* a1
#endif
#if ADAPTERS > 2
      , const float* a2
#endif
      , u16* low0
#if ADAPTERS > 1
      , u16* low1
#endif
#if ADAPTERS > 2
      , u16* low2
#endif
      , const __grid_constant__ Parameters p) {
    const float* a[3] = {a0
#if ADAPTERS > 1
                         , a1
#endif
#if ADAPTERS > 2
                         , a2
#endif
    };
    u16* low[3] = {low0
#if ADAPTERS > 1
                   , low1
#endif
#if ADAPTERS > 2
                   , low2
#endif
    };
    __shared__ float sums[32][ADAPTERS * RANK];
    const int rows = (int)p.rows, width = (int)p.width;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int lane_row = lane >> 2, lane_column = (lane & 3) * 8;
    const int first_row = blockIdx.x * 32;
    for (int i = threadIdx.x; i < 32 * ADAPTERS * RANK; i += 256) (&sums[0][0])[i] = 0.f;
    __syncthreads();

    float acc[2][ADAPTERS][TILES][4];
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < ADAPTERS; i++)
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[m][i][t][e] = 0.f;

    for (int k = warp * 32 + lane_column; k < width; k += 256) {
        uint4 input[2][2];
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = min(first_row + m * 16 + h * 8 + lane_row, rows - 1);
                input[m][h] = *(const uint4*)(x + (u64)row * width + k);
            }
#pragma unroll
        for (int i = 0; i < ADAPTERS; i++) {
            uint4 masked[2][2];
#pragma unroll
            for (int m = 0; m < 2; m++)
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
                for (int m = 0; m < 2; m++) {
                    mma_16x8x16(acc[m][i][t], masked[m][0].x, masked[m][1].x, masked[m][0].y, masked[m][1].y, b0, b1);
                    mma_16x8x16(acc[m][i][t], masked[m][0].z, masked[m][1].z, masked[m][0].w, masked[m][1].w, b2, b3);
                }
            }
        }
    }
    // Warps add their shares one after another: the order of the sum is fixed.
    for (int turn = 0; turn < 8; turn++) {
        if (warp == turn) {
#pragma unroll
            for (int m = 0; m < 2; m++)
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
    for (int i = threadIdx.x; i < 32 * ADAPTERS * RANK / 2; i += 256) {
        const int row = i / (ADAPTERS * RANK / 2), column = i % (ADAPTERS * RANK / 2) * 2;
        if (first_row + row >= rows) continue;
        const u32 packed = pack_bf16(sums[row][column] * scale, sums[row][column + 1] * scale);
        *(u32*)(low[column / RANK] + (u64)(first_row + row) * RANK + column % RANK) = packed;
    }
}
#endif

#if LOW_RANK_OUTER
// part[chunk, RANK, width] = sum over the chunk's rows of low[row, :]^T drop(x)[row, :].
//
// A thread owns two columns and RANK x 2 sums; rows of `low` are broadcast from shared memory.
// The parts are added up by SUM_PARTS, in order.
#define ROWS_AT_ONCE 32
extern "C" __global__ void __launch_bounds__(128)
ENTRY(const u16* low, const u16* x, float* part, const __grid_constant__ Parameters p) {
    __shared__ float staged[ROWS_AT_ONCE][RANK];
    const int rows = (int)p.rows, width = (int)p.width;
    const int column = (blockIdx.x * 128 + threadIdx.x) * 2;
    const int first = blockIdx.y * (int)p.chunk, end = min(first + (int)p.chunk, rows);
    float acc[RANK][2];
#pragma unroll
    for (int r = 0; r < RANK; r++) acc[r][0] = acc[r][1] = 0.f;
#if DROPOUT
    const Mask mask = mask_of(p, 0);
#endif
    for (int base = first; base < end; base += ROWS_AT_ONCE) {
        const int count = min(ROWS_AT_ONCE, end - base);
        __syncthreads();
        for (int i = threadIdx.x; i < count * RANK; i += 128)
            (&staged[0][0])[i] = bf16_to_float(low[(u64)base * RANK + i]);
        __syncthreads();
        if (column >= width) continue;
#pragma unroll 8
        for (int i = 0; i < count; i++) {
            u32 packed = *(const u32*)(x + (u64)(base + i) * width + column);
#if DROPOUT
            packed = drop_pair(packed, ((u32)(base + i) * (u32)width + column) >> 1, mask);
#endif
            const float left = low_half(packed), right = high_half(packed);
#pragma unroll
            for (int r = 0; r < RANK; r++) {
                acc[r][0] += staged[i][r] * left;
                acc[r][1] += staged[i][r] * right;
            }
        }
    }
    if (column >= width) return;
    float scale = __uint_as_float((u32)p.scale);
#if DROPOUT
    scale *= mask.scale;
#endif
#pragma unroll
    for (int r = 0; r < RANK; r++) {
        float2 pair = make_float2(acc[r][0] * scale, acc[r][1] * scale);
        *(float2*)(part + ((u64)blockIdx.y * RANK + r) * width + column) = pair;
    }
}
#endif

#if SUM_PARTS
// out = sum of `chunk` parts of [RANK, width]; written as it is, or transposed to [width, RANK].
extern "C" __global__ void __launch_bounds__(256)
ENTRY(const float* part, float* out, const __grid_constant__ Parameters p) {
    const u64 count = RANK * p.width;
    const u64 at = (u64)blockIdx.x * 256 + threadIdx.x;
    if (at >= count) return;
    float sum = 0.f;
    for (u64 i = 0; i < p.chunk; i++) sum += part[i * count + at];
    const u64 row = at / p.width, column = at % p.width;
    out[TRANSPOSED ? column * RANK + row : at] = sum;
}
#endif

#if LOW_RANK_SPREAD
// dx += sum over adapters of drop_i(low_i A_i): dx [rows, width] bf16 in place, low_i [rows, RANK]
// bf16, A_i [RANK, width] f32. A thread owns two columns with all of A's and walks rows.
extern "C" __global__ void __launch_bounds__(128)
ENTRY(const u16* low0, const float* a0
#if ADAPTERS > 1
      , const u16* low1, const float* a1
#endif
#if ADAPTERS > 2
      , const u16* low2, const float* a2
#endif
      , u16* dx, const __grid_constant__ Parameters p) {
    const u16* low[3] = {low0
#if ADAPTERS > 1
                         , low1
#endif
#if ADAPTERS > 2
                         , low2
#endif
    };
    const float* a[3] = {a0
#if ADAPTERS > 1
                         , a1
#endif
#if ADAPTERS > 2
                         , a2
#endif
    };
    __shared__ float staged[32][ADAPTERS * RANK];
    const int rows = (int)p.rows, width = (int)p.width;
    const int column = (blockIdx.x * 128 + threadIdx.x) * 2;
    const int first = blockIdx.y * (int)p.chunk, end = min(first + (int)p.chunk, rows);
    float factors[ADAPTERS * RANK][2];
#pragma unroll
    for (int i = 0; i < ADAPTERS; i++)
#pragma unroll
        for (int r = 0; r < RANK; r++) {
            const float2 pair = column < width ? *(const float2*)(a[i] + (u64)r * width + column) : make_float2(0.f, 0.f);
            factors[i * RANK + r][0] = pair.x;
            factors[i * RANK + r][1] = pair.y;
        }
    for (int base = first; base < end; base += 32) {
        const int count = min(32, end - base);
        __syncthreads();
        for (int i = threadIdx.x; i < count * ADAPTERS * RANK; i += 128) {
            const int row = i / (ADAPTERS * RANK), at = i % (ADAPTERS * RANK);
            staged[row][at] = bf16_to_float(low[at / RANK][(u64)(base + row) * RANK + at % RANK]);
        }
        __syncthreads();
        if (column >= width) continue;
#pragma unroll 4
        for (int i = 0; i < count; i++) {
            u32* to = (u32*)(dx + (u64)(base + i) * width + column);
            const u32 old = *to;
            float left = low_half(old), right = high_half(old);
#pragma unroll
            for (int j = 0; j < ADAPTERS; j++) {
                float share_left = 0.f, share_right = 0.f;
#pragma unroll
                for (int r = 0; r < RANK; r++) {
                    share_left += staged[i][j * RANK + r] * factors[j * RANK + r][0];
                    share_right += staged[i][j * RANK + r] * factors[j * RANK + r][1];
                }
#if DROPOUT
                const Mask mask = mask_of(p, j);
                const u32 bits = mask_bits(((u32)(base + i) * (u32)width + column) >> 1, mask);
                share_left = (bits & 0xffffu) >= mask.threshold ? share_left * mask.scale : 0.f;
                share_right = (bits >> 16) >= mask.threshold ? share_right * mask.scale : 0.f;
#endif
                left += share_left;
                right += share_right;
            }
            *to = pack_bf16(left, right);
        }
    }
}
#endif

#if SCALE_CAST
// B [width, RANK] f32 -> scale * B as [width, RANK] bf16 and as [RANK, width] f32.
extern "C" __global__ void __launch_bounds__(256)
ENTRY(const float* b, u16* cast, float* transposed, const __grid_constant__ Parameters p) {
    const u64 at = (u64)blockIdx.x * 256 + threadIdx.x;
    if (at >= p.width * RANK) return;
    const float value = b[at] * __uint_as_float((u32)p.scale);
    cast[at] = (u16)pack_bf16(value, 0.f);
    transposed[at % RANK * p.width + at / RANK] = value;
}
#endif

#if MASK_FILL
// The mask itself, f32: what the plain operations multiply with.
extern "C" __global__ void __launch_bounds__(256)
ENTRY(float* out, const __grid_constant__ Parameters p) {
    const u64 pair = (u64)blockIdx.x * 256 + threadIdx.x;
    if (pair * 2 >= p.rows * p.width) return;
    const Mask mask = mask_of(p, 0);
    const u32 bits = mask_bits((u32)pair, mask);
    out[pair * 2] = (bits & 0xffffu) >= mask.threshold ? mask.scale : 0.f;
    if (pair * 2 + 1 < p.rows * p.width) out[pair * 2 + 1] = (bits >> 16) >= mask.threshold ? mask.scale : 0.f;
}
#endif
