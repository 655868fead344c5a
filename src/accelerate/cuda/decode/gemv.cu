// Matrix-vector multiplication (GEMV), limited by memory bandwidth: y[N] = x[K] W[N, K]^T, bf16 in, f32 sums.
//
// A block owns 4 rows of W; its 8 warps take 256 columns each in rotation, a lane reads 16 bytes of each row
// at a time, past L1 and with nothing else in between. With a norm before the matmul the vector is
// read unnormalised: x g goes into the dot product, 1 / rms(x) is a factor on the result, so the norm
// costs one more sum and no separate pass.
//
// Configuration: WEIGHTS 1 to 3 (matrices of one input, rows counted on), NORM (x is normalised with
// weight g), GATE (two matrices: y = silu(first) * second), RESIDUAL (added), OUT_F32.
// K is a multiple of 8, the rows of each matrix a multiple of 4 (of 2 with GATE). OVERLAP: overlap.cuh;
// the first weights are read before the vector is written.
// Limit: memory, 2 N K bytes. Registers: 2 x 4 vectors of 16 bytes in flight a lane.
// On an H100 (Nsight Compute), of the memory's rate: head 95 %, gate and up 89 %, q, k and v 77 %, output 70 %: the smaller
// the matrix, the more its launch weighs. 58 to 64 registers.

#define WARPS 8
#define ROWS 4
#define DEPTH 2

struct Parameters {
    u64 k;
    u64 rows[3];
    u64 epsilon;  // f32 bits
};

__device__ __forceinline__ uint4 read_once(const u16* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

__device__ __forceinline__ float dot(const uint4& a, const float (&x)[8]) {
    float sum = low_half(a.x) * x[0];
    sum += high_half(a.x) * x[1];
    sum += low_half(a.y) * x[2];
    sum += high_half(a.y) * x[3];
    sum += low_half(a.z) * x[4];
    sum += high_half(a.z) * x[5];
    sum += low_half(a.w) * x[6];
    sum += high_half(a.w) * x[7];
    return sum;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 4)
ENTRY(const u16* x,
#if NORM
      const u16* norm_weight,
#endif
      const u16* w0,
#if WEIGHTS > 1
      const u16* w1,
#endif
#if WEIGHTS > 2
      const u16* w2,
#endif
#if RESIDUAL
      const u16* residual,
#endif
#if OUT_F32
      float* y,
#else
      u16* y,
#endif
      const __grid_constant__ Parameters p) {
    __shared__ float shared_sums[WARPS][ROWS + 1];
    let_next_begin();
    bool waited = !OVERLAP;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int k_end = (int)p.k;
    const u16* row[ROWS];
#if GATE
    const int first = blockIdx.x * (ROWS / 2);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        row[r] = (r < ROWS / 2 ? w0 : w1) + (u64)(first + r % (ROWS / 2)) * p.k;
#else
    const int first = blockIdx.x * ROWS;
    {
        const u16* matrix = w0;
        int within = first;
#if WEIGHTS > 1
        if (within >= (int)p.rows[0]) {
            within -= (int)p.rows[0];
            matrix = w1;
#if WEIGHTS > 2
            if (within >= (int)p.rows[1]) {
                within -= (int)p.rows[1];
                matrix = w2;
            }
#endif
        }
#endif
#pragma unroll
        for (int r = 0; r < ROWS; r++) row[r] = matrix + (u64)(within + r) * p.k;
    }
#endif
    float acc[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) acc[r] = 0.f;
    float squares = 0.f;

    for (int base = warp * 256 + lane * 8; base < k_end; base += WARPS * 256 * DEPTH) {
        uint4 weights[DEPTH][ROWS];
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const int k = base + d * WARPS * 256;
            if (k < k_end) {
#pragma unroll
                for (int r = 0; r < ROWS; r++) weights[d][r] = read_once(row[r] + k);
            }
        }
        if (!waited) wait_for_last();
        waited = true;
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const int k = base + d * WARPS * 256;
            if (k < k_end) {
                float input[8];
                load_vector(x + k, input);
#if NORM
                float factor[8];
                load_vector(norm_weight + k, factor);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    squares += input[i] * input[i];
                    input[i] *= factor[i];
                }
#endif
#pragma unroll
                for (int r = 0; r < ROWS; r++) acc[r] += dot(weights[d][r], input);
            }
        }
    }
    if (!waited) wait_for_last();
#pragma unroll
    for (int r = 0; r < ROWS; r++) acc[r] = warp_sum(acc[r]);
    squares = NORM ? warp_sum(squares) : 0.f;
    if (lane == 0) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) shared_sums[warp][r] = acc[r];
        shared_sums[warp][ROWS] = squares;
    }
    __syncthreads();
    const int outputs = GATE ? ROWS / 2 : ROWS;
    if (threadIdx.x >= outputs) return;
    float value = 0.f, second = 0.f, scale = 1.f;
    for (int w = 0; w < WARPS; w++) {
        value += shared_sums[w][threadIdx.x];
#if GATE
        second += shared_sums[w][threadIdx.x + ROWS / 2];
#endif
    }
#if NORM
    float sum = 0.f;
    for (int w = 0; w < WARPS; w++) sum += shared_sums[w][ROWS];
    scale = rsqrtf(sum / (float)k_end + __uint_as_float((u32)p.epsilon));
#endif
    value *= scale;
#if GATE
    value = value / (1.f + __expf(-value)) * (second * scale);
#endif
    const int at = first + threadIdx.x;
#if RESIDUAL
    value += bf16_to_float(residual[at]);
#endif
#if OUT_F32
    y[at] = value;
#else
    y[at] = (u16)pack_bf16(value, 0.f);
#endif
}
