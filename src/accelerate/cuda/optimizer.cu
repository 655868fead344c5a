// AdamW and the norm of all gradients, over many tensors in a launch; f32 throughout.
//
// Configuration: TENSORS (24 or 64: whose pointers are parameters of a launch) and one of ADAMW,
// SQUARE_SUMS, CLIP_SCALE. Grid: blocks of a tensor x tensors. Limit: memory.
// Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"; Pascanu, Mikolov and Bengio 2013 for the
// common norm.
// On an H100 (Nsight Compute, adapters of rank 8): ADAMW 51 % of the memory's rate, 29 registers; the sums and the
// scale take 13 and 3 us, which is launch overhead.

#define EIGHT(X, a, b, c, d, e, f, g, h) X(a) X(b) X(c) X(d) X(e) X(f) X(g) X(h)
#define EACH_OF_24(X) \
    EIGHT(X, 0, 1, 2, 3, 4, 5, 6, 7) EIGHT(X, 8, 9, 10, 11, 12, 13, 14, 15) EIGHT(X, 16, 17, 18, 19, 20, 21, 22, 23)
#define EACH_OF_64(X)                                                                                   \
    EACH_OF_24(X) EIGHT(X, 24, 25, 26, 27, 28, 29, 30, 31) EIGHT(X, 32, 33, 34, 35, 36, 37, 38, 39)     \
    EIGHT(X, 40, 41, 42, 43, 44, 45, 46, 47) EIGHT(X, 48, 49, 50, 51, 52, 53, 54, 55)                   \
    EIGHT(X, 56, 57, 58, 59, 60, 61, 62, 63)

__device__ __forceinline__ float field(u64 bits) { return __uint_as_float((u32)bits); }

#if ADAMW
struct One {
    u64 count;
    u64 place;  // offset of its results, in elements
    u64 step_size, second_scale, keep;  // f32 bits
};
struct Parameters {
    u64 beta1, beta2, epsilon;  // f32 bits
    u64 total;                  // elements of each result
    One each[TENSORS];
};

#define POINTERS(i) const float *value##i, const float *gradient##i, const float *first##i, const float *second##i,
#define TAKE(i)                \
    case i:                    \
        value = value##i;      \
        gradient = gradient##i; \
        first = first##i;      \
        second = second##i;    \
        break;

// results [3, total]: values, means, mean squares. Gradients are multiplied by clip[1] first.
extern "C" __global__ void __launch_bounds__(256)
ENTRY(EACH_OF_24(POINTERS) const float* clip, float* results, const __grid_constant__ Parameters p) {
    const float *value = value0, *gradient = gradient0, *first = first0, *second = second0;
    switch (blockIdx.y) { EACH_OF_24(TAKE) }
    const One& one = p.each[blockIdx.y];
    float* to = results + one.place;
    const float beta1 = field(p.beta1), beta2 = field(p.beta2);
    const float scale = CLIPPED ? clip[1] : 1.f;
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < one.count; i += (u64)gridDim.x * 256) {
        const float g = gradient[i] * scale;
        const float mean = first[i] * beta1 + g * (1.f - beta1);
        const float square = second[i] * beta2 + g * g * (1.f - beta2);
        const float root = sqrtf(square * field(one.second_scale)) + field(p.epsilon);
        to[i] = value[i] * field(one.keep) - mean / root * field(one.step_size);
        to[p.total + i] = mean;
        to[2 * p.total + i] = square;
    }
}
#endif

#if SQUARE_SUMS
struct Parameters {
    u64 place;  // where the first tensor's sums go
    u64 count[TENSORS];
};

#define POINTERS(i) const float *x##i,
#define TAKE(i) case i: x = x##i; break;

// A block's part of the sum, in a fixed order: sums[place + tensor * blocks + block].
extern "C" __global__ void __launch_bounds__(256)
ENTRY(EACH_OF_64(POINTERS) float* sums, const __grid_constant__ Parameters p) {
    __shared__ float scratch[8];
    const float* x = x0;
    switch (blockIdx.y) { EACH_OF_64(TAKE) }
    const u64 count = p.count[blockIdx.y];
    float sum = 0.f;
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < count; i += (u64)gridDim.x * 256) sum += x[i] * x[i];
    sum = block_sum<8>(sum, scratch);
    if (threadIdx.x == 0) sums[p.place + blockIdx.y * gridDim.x + blockIdx.x] = sum;
}
#endif

#if CLIP_SCALE
struct Parameters {
    u64 count;
    u64 max_norm;  // f32 bits; 0: nothing is clipped
};

// From sums of squares: clip[0] the norm, clip[1] the factor that scales it down to max_norm.
extern "C" __global__ void __launch_bounds__(256)
ENTRY(const float* sums, float* clip, const __grid_constant__ Parameters p) {
    __shared__ float scratch[8];
    float sum = 0.f;
    for (u64 i = threadIdx.x; i < p.count; i += 256) sum += sums[i];
    const float norm = sqrtf(block_sum<8>(sum, scratch));
    if (threadIdx.x > 0) return;
    const float most = field(p.max_norm), scale = most / (norm + 1e-6f);
    clip[0] = norm;
    clip[1] = most > 0.f && scale < 1.f ? scale : 1.f;
}
#endif
