// Element types of the pointwise and rowwise kernels, without any header: NVRTC needs none then.
//
// SCALAR_BF16 = 1: elements are bf16, eight to a 16-byte vector; 0: f32, four to a vector.
// All arithmetic is f32; one rounding, to nearest even, when an element is stored.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ float bf16_to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ float low_half(u32 packed) { return __uint_as_float(packed << 16); }
__device__ __forceinline__ float high_half(u32 packed) { return __uint_as_float(packed & 0xffff0000u); }

#if SCALAR_BF16
typedef u16 scalar;
#define VECTOR 8
__device__ __forceinline__ float load(const scalar* from) { return bf16_to_float(*from); }
__device__ __forceinline__ void store(scalar* to, float value) { *to = (u16)pack_bf16(value, 0.f); }
__device__ __forceinline__ float rounded(float value) { return low_half(pack_bf16(value, 0.f)); }
__device__ __forceinline__ void load_vector(const scalar* from, float (&values)[VECTOR]) {
    const uint4 raw = *(const uint4*)from;
    const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[2 * i] = low_half(words[i]);
        values[2 * i + 1] = high_half(words[i]);
    }
}
__device__ __forceinline__ void store_vector(scalar* to, const float (&values)[VECTOR]) {
    uint4 raw;
    raw.x = pack_bf16(values[0], values[1]);
    raw.y = pack_bf16(values[2], values[3]);
    raw.z = pack_bf16(values[4], values[5]);
    raw.w = pack_bf16(values[6], values[7]);
    *(uint4*)to = raw;
}
#else
typedef float scalar;
#define VECTOR 4
__device__ __forceinline__ float load(const scalar* from) { return *from; }
__device__ __forceinline__ void store(scalar* to, float value) { *to = value; }
__device__ __forceinline__ float rounded(float value) { return value; }
__device__ __forceinline__ void load_vector(const scalar* from, float (&values)[VECTOR]) {
    const float4 raw = *(const float4*)from;
    values[0] = raw.x;
    values[1] = raw.y;
    values[2] = raw.z;
    values[3] = raw.w;
}
__device__ __forceinline__ void store_vector(scalar* to, const float (&values)[VECTOR]) {
    *(float4*)to = make_float4(values[0], values[1], values[2], values[3]);
}
#endif

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance >>= 1)
        value += __shfl_xor_sync(~0u, value, distance);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance >>= 1)
        value = fmaxf(value, __shfl_xor_sync(~0u, value, distance));
    return value;
}

// Sum over a block of WARPS warps; every thread gets it. `scratch` is free again on return.
template <int WARPS>
__device__ __forceinline__ float block_sum(float value, float* scratch) {
    value = warp_sum(value);
    if (WARPS == 1) return value;
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = value;
    __syncthreads();
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += scratch[warp];
    __syncthreads();
    return sum;
}
