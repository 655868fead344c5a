// Norms over the rows of [rows, WIDTH], statistics in f32; one block a row, the row in registers.
//
// Configuration: WIDTH (a multiple of VECTOR), THREADS (a multiple of 32), and one of NORM_RMS,
// NORM_RMS_BACKWARD, NORM_LAYER. Registers hold WIDTH / THREADS values a thread; shared memory
// holds one float a warp. Limit: memory; a row is read once and written once.
// Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"; Ba, Kiros and Hinton 2016, "Layer
// Normalization".
// On an H100 (Nsight Compute), of the memory's rate: NORM_RMS_BACKWARD 84 % with 5,888 rows of 4,096, NORM_LAYER 85 %
// with 32,768 of 1,152; 368 rows take 4 us, which is launch overhead. 32 registers, backward 56.

#define WARPS (THREADS / 32)
#define VECTORS (WIDTH / VECTOR)
#define PER_THREAD ((VECTORS + THREADS - 1) / THREADS)

struct Parameters {
    u64 rows;
    u64 epsilon;  // f32 bits
};

#if NORM_RMS
// y = round(x / rms(x)) * weight
extern "C" __global__ void __launch_bounds__(THREADS)
ENTRY(const scalar* x, const scalar* weight, scalar* y, const __grid_constant__ Parameters p) {
    __shared__ float scratch[WARPS];
    const scalar* row = x + (u64)blockIdx.x * WIDTH;
    float values[PER_THREAD][VECTOR];
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        const int at = (i * THREADS + threadIdx.x) * VECTOR;
        if (at < WIDTH) {
            load_vector(row + at, values[i]);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) squares += values[i][j] * values[i][j];
        }
    }
    const float mean = block_sum<WARPS>(squares, scratch) / WIDTH;
    const float scale = rsqrtf(mean + __uint_as_float((u32)p.epsilon));
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        const int at = (i * THREADS + threadIdx.x) * VECTOR;
        if (at < WIDTH) {
            float factor[VECTOR];
            load_vector(weight + at, factor);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) values[i][j] = rounded(values[i][j] * scale) * factor[j];
            store_vector(y + (u64)blockIdx.x * WIDTH + at, values[i]);
        }
    }
}
#endif

#if NORM_RMS_BACKWARD
// With n = x / rms(x) and g = dy * weight: dx = residual + (g - n * mean(g * n)) / rms(x).
extern "C" __global__ void __launch_bounds__(THREADS)
ENTRY(const scalar* x, const scalar* weight, const scalar* dy, const scalar* residual, scalar* dx,
      const __grid_constant__ Parameters p) {
    __shared__ float scratch[WARPS];
    const u64 start = (u64)blockIdx.x * WIDTH;
    float values[PER_THREAD][VECTOR], gradient[PER_THREAD][VECTOR];
    float squares = 0.f, along = 0.f;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        const int at = (i * THREADS + threadIdx.x) * VECTOR;
        if (at < WIDTH) {
            float factor[VECTOR];
            load_vector(x + start + at, values[i]);
            load_vector(dy + start + at, gradient[i]);
            load_vector(weight + at, factor);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) {
                gradient[i][j] *= factor[j];
                squares += values[i][j] * values[i][j];
                along += gradient[i][j] * values[i][j];
            }
        }
    }
    const float mean = block_sum<WARPS>(squares, scratch) / WIDTH;
    const float scale = rsqrtf(mean + __uint_as_float((u32)p.epsilon));
    along = block_sum<WARPS>(along, scratch) / WIDTH * scale * scale;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        const int at = (i * THREADS + threadIdx.x) * VECTOR;
        if (at < WIDTH) {
            float sum[VECTOR];
            load_vector(residual + start + at, sum);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) sum[j] += (gradient[i][j] - values[i][j] * along) * scale;
            store_vector(dx + start + at, sum);
        }
    }
}
#endif

#if NORM_LAYER
extern "C" __global__ void __launch_bounds__(THREADS)
ENTRY(const scalar* x, const scalar* weight, const scalar* bias, scalar* y,
      const __grid_constant__ Parameters p) {
    __shared__ float scratch[WARPS];
    const scalar* row = x + (u64)blockIdx.x * WIDTH;
    float values[PER_THREAD][VECTOR];
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        const int at = (i * THREADS + threadIdx.x) * VECTOR;
        if (at < WIDTH) {
            load_vector(row + at, values[i]);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) sum += values[i][j];
        }
    }
    const float mean = block_sum<WARPS>(sum, scratch) / WIDTH;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        if ((i * THREADS + threadIdx.x) * VECTOR < WIDTH) {
#pragma unroll
            for (int j = 0; j < VECTOR; j++) {
                values[i][j] -= mean;
                squares += values[i][j] * values[i][j];
            }
        }
    }
    const float variance = block_sum<WARPS>(squares, scratch) / WIDTH;
    const float scale = rsqrtf(variance + __uint_as_float((u32)p.epsilon));
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        const int at = (i * THREADS + threadIdx.x) * VECTOR;
        if (at < WIDTH) {
            float factor[VECTOR], shift[VECTOR];
            load_vector(weight + at, factor);
            load_vector(bias + at, shift);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) values[i][j] = values[i][j] * scale * factor[j] + shift[j];
            store_vector(y + (u64)blockIdx.x * WIDTH + at, values[i]);
        }
    }
}
#endif
