// Pointwise operations over contiguous tensors, a vector a thread and step. Limit: memory.
//
// Configuration: one of SWIGLU, SWIGLU_BACKWARD, GELU_TANH, GELU_EXACT. The number of elements is a
// multiple of VECTOR.
// Source: Shazeer 2020, "GLU Variants Improve Transformer"; Hendrycks and Gimpel 2016, "Gaussian Error Linear Units".
// On an H100 (Nsight Compute), SWIGLU: 88 % of the memory's rate with 5,888 rows of 12,288, 63 % with 368; 36 registers.

struct Parameters {
    u64 vectors;
};

__device__ __forceinline__ float gelu_tanh(float x) {
    return 0.5f * x * (1.f + tanhf(0.7978845608028654f * x * (1.f + 0.044715f * x * x)));
}

__device__ __forceinline__ float gelu_exact(float x) {
    return 0.5f * x * (1.f + erff(x * 0.7071067811865476f));
}

#define FOR_EACH_VECTOR(at)                                                        \
    for (u64 at = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;           \
         at < p.vectors * VECTOR; at += (u64)gridDim.x * blockDim.x * VECTOR)

#if SWIGLU
extern "C" __global__ void __launch_bounds__(256)
ENTRY(const scalar* gate, const scalar* up, scalar* y, const __grid_constant__ Parameters p) {
    FOR_EACH_VECTOR(at) {
        float g[VECTOR], u[VECTOR];
        load_vector(gate + at, g);
        load_vector(up + at, u);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) g[i] = swiglu(g[i], u[i]);
        store_vector(y + at, g);
    }
}
#endif

#if SWIGLU_BACKWARD
extern "C" __global__ void __launch_bounds__(256)
ENTRY(const scalar* gate, const scalar* up, const scalar* dy, scalar* dgate, scalar* dup,
      const __grid_constant__ Parameters p) {
    FOR_EACH_VECTOR(at) {
        float g[VECTOR], u[VECTOR], d[VECTOR];
        load_vector(gate + at, g);
        load_vector(up + at, u);
        load_vector(dy + at, d);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) swiglu_backward(g[i], u[i], d[i]);
        store_vector(dgate + at, g);
        store_vector(dup + at, u);
    }
}
#endif

#if GELU_TANH || GELU_EXACT
extern "C" __global__ void __launch_bounds__(256)
ENTRY(const scalar* x, scalar* y, const __grid_constant__ Parameters p) {
    FOR_EACH_VECTOR(at) {
        float v[VECTOR];
        load_vector(x + at, v);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) v[i] = GELU_TANH ? gelu_tanh(v[i]) : gelu_exact(v[i]);
        store_vector(y + at, v);
    }
}
#endif
