// One AdamW step of one tensor, and sums of squares for the norm of all gradients; f32 throughout.
//
// Configuration: ADAMW or SQUARE_SUMS. Limit: memory.

struct Parameters {
    u64 count;
    u64 place;  // SQUARE_SUMS: where this tensor's sums go
    u64 beta1, beta2, epsilon, step_size, second_scale, keep;  // f32 bits
};

__device__ __forceinline__ float field(u64 bits) { return __uint_as_float((u32)bits); }

#if ADAMW
extern "C" __global__ void __launch_bounds__(256)
ENTRY(const float* value, const float* gradient, const float* first, const float* second, float* new_value,
      float* new_first, float* new_second, const __grid_constant__ Parameters p) {
    const float beta1 = field(p.beta1), beta2 = field(p.beta2);
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < p.count; i += (u64)gridDim.x * 256) {
        const float g = gradient[i];
        const float mean = first[i] * beta1 + g * (1.f - beta1);
        const float square = second[i] * beta2 + g * g * (1.f - beta2);
        const float root = sqrtf(square * field(p.second_scale)) + field(p.epsilon);
        new_value[i] = value[i] * field(p.keep) - mean / root * field(p.step_size);
        new_first[i] = mean;
        new_second[i] = square;
    }
}
#endif

#if SQUARE_SUMS
// A block's share of the sum, in a fixed order: sums[place + block].
extern "C" __global__ void __launch_bounds__(256)
ENTRY(const float* x, float* sums, const __grid_constant__ Parameters p) {
    __shared__ float scratch[8];
    float sum = 0.f;
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < p.count; i += (u64)gridDim.x * 256) sum += x[i] * x[i];
    sum = block_sum<8>(sum, scratch);
    if (threadIdx.x == 0) sums[p.place + blockIdx.x] = sum;
}
#endif
