// Matmul of f32 matrices in f32: no tensor core, which would round the operands to TF32.
//
// y[batch, m, n] = sum over k of a[batch, m, k] b[batch, k, n]; any strides, two leading axes, y contiguous.
// Tile 64 x 64 over slabs of 16, 256 threads of 4 x 4 elements; 8.5 KB of shared memory. Every element is one
// chain of fused multiply-adds along k. Limit: FMA rate (67 TFLOP/s on an H100); f32 is the
// exact reference to compare with, so the kernel is kept simple.
// Source: Volkov and Demmel 2008, "Benchmarking GPUs to Tune Dense Linear Algebra" (tiles in registers).
// On an H100 (Nsight Compute, the vision tower's matmuls in f32): a third of the FMA rate, 160 registers.

typedef unsigned long long u64;

struct Parameters {
    u64 inner;  // size of the second leading axis
    u64 m, n, k;
    u64 a_strides[4], b_strides[4];
};

constexpr int TILE = 64, SLAB = 16, EACH = 4;

// A tile of [64 rows, 16 of k] into tile[k][row]; neighbouring threads read neighbouring memory.
__device__ __forceinline__ void load_tile(float (*tile)[TILE + 4], const float* from, u64 row_stride, u64 k_stride,
                                          u64 first_row, u64 first_k, u64 rows, u64 depth) {
    const bool along_k = k_stride == 1;
#pragma unroll
    for (int step = 0; step < TILE * SLAB / 256; step++) {
        const int at = threadIdx.x + 256 * step;
        const int row = along_k ? at / SLAB : at % TILE;
        const int k = along_k ? at % SLAB : at / TILE;
        const bool inside = first_row + row < rows && first_k + k < depth;
        tile[k][row] = inside ? from[(first_row + row) * row_stride + (first_k + k) * k_stride] : 0.f;
    }
}

extern "C" __global__ void __launch_bounds__(256)
ENTRY(const float* a, const float* b, float* y, const __grid_constant__ Parameters p) {
    __shared__ float a_tile[SLAB][TILE + 4], b_tile[SLAB][TILE + 4];
    const u64 outer = blockIdx.z / p.inner, inner = blockIdx.z % p.inner;
    a += outer * p.a_strides[0] + inner * p.a_strides[1];
    b += outer * p.b_strides[0] + inner * p.b_strides[1];
    y += blockIdx.z * p.m * p.n;
    const u64 first_row = (u64)blockIdx.y * TILE, first_column = (u64)blockIdx.x * TILE;
    const int row = threadIdx.x / 16 * EACH, column = threadIdx.x % 16 * EACH;

    float sums[EACH][EACH] = {};
    for (u64 first_k = 0; first_k < p.k; first_k += SLAB) {
        load_tile(a_tile, a, p.a_strides[2], p.a_strides[3], first_row, first_k, p.m, p.k);
        load_tile(b_tile, b, p.b_strides[3], p.b_strides[2], first_column, first_k, p.n, p.k);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < SLAB; k++) {
            const float4 left = *(const float4*)&a_tile[k][row];
            const float4 right = *(const float4*)&b_tile[k][column];
            const float l[EACH] = {left.x, left.y, left.z, left.w}, r[EACH] = {right.x, right.y, right.z, right.w};
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int j = 0; j < EACH; j++) sums[i][j] = fmaf(l[i], r[j], sums[i][j]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const u64 m = first_row + row + i, n = first_column + column + j;
            if (m < p.m && n < p.n) y[m * p.n + n] = sums[i][j];
        }
}
