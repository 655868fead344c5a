// Shared by every CUDA kernel of this folder: bf16, shared-memory copies, tensor-core wrappers, fast math.
//
// The text is put in front of a kernel's own text and compiled at run time by NVRTC, with nothing but an
// architecture flag (sm_80 and up). No header may be included: a machine that has only the driver and the NVRTC
// library has none. So bf16 is a struct of its 16 bits, and PTX replaces the wrappers of CUDA's headers.
//
// Source: PTX ISA 8 (cp.async, ldmatrix, mma, cvt, ex2, rcp), CUDA C++ Programming Guide (built-in intrinsics).
#ifndef XRAY_KERNELS_COMMON
#define XRAY_KERNELS_COMMON

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// ---------------------------------------------------------------------------------------------- bf16

// One bf16: the upper half of the f32 with the same value.
struct bf16 {
    u16 bits;
};

__device__ __forceinline__ float bf16_to_float(bf16 value) {
    return __uint_as_float(static_cast<u32>(value.bits) << 16);
}

// Rounds to nearest, ties to even.
__device__ __forceinline__ bf16 float_to_bf16(float value) {
    bf16 result;
    asm("cvt.rn.bf16.f32 %0, %1;\n" : "=h"(result.bits) : "f"(value));
    return result;
}

// Two neighbours in memory as one word: `low` has the lower address. Rounds to nearest, ties to even.
__device__ __forceinline__ u32 pack_bf16x2(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ float low_bf16(u32 pair) {
    return __uint_as_float(pair << 16);
}

__device__ __forceinline__ float high_bf16(u32 pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

// ------------------------------------------------------------------------- global and shared memory

// Address within shared memory, as cp.async, ldmatrix, mbarrier and TMA take it.
__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Reads 16 bytes that this kernel uses once: past L1, 128 bytes at a time into L2. Read-only data alone.
__device__ __forceinline__ uint4 load_streaming_16(const void* source) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(source));
    return v;
}

// Starts a 16-byte copy from global to shared memory. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async_16(u32 destination, const void* source) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n" ::"r"(destination), "l"(source));
}

// The same; if not `valid`, writes 16 zero bytes. Nothing is read then, but the address is the valid one
// `instead`: memory checkers look at addresses, and so may a card.
__device__ __forceinline__ void copy_async_16_or_zero(u32 destination, const void* source, const void* instead,
                                                      bool valid) {
    const u32 bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(destination),
                 "l"(valid ? source : instead), "r"(bytes));
}

// Closes the group of copies that this thread started since the last group.
__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;\n" ::);
}

// Waits until at most `OPEN_GROUPS` of this thread's newest groups are in flight.
template <int OPEN_GROUPS>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(OPEN_GROUPS) : "memory");
}

// ------------------------------------------------------------------------------------- tensor cores

// Four 8x8 matrices of bf16 from shared memory. Lanes 8i..8i+7 give the addresses of the rows of matrix i.
// Lane l receives, of matrix i, the elements [l / 4][2 (l % 4)] and [l / 4][2 (l % 4) + 1] in `r_i`.
__device__ __forceinline__ void load_matrix_x4(u32 address, u32& r0, u32& r1, u32& r2, u32& r3) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
                 : "r"(address)
                 : "memory");
}

// The same, each matrix transposed: lane l receives [2 (l % 4)][l / 4] and [2 (l % 4) + 1][l / 4].
__device__ __forceinline__ void load_matrix_x4_transposed(u32 address, u32& r0, u32& r1, u32& r2, u32& r3) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
                 : "r"(address)
                 : "memory");
}

// c[16, 8] += a[16, 16] * b[16, 8], bf16 in, f32 out, one warp. With g = lane / 4 and t = lane % 4:
//   a[0]: row g,     k 2t, 2t + 1      a[2]: row g,     k 2t + 8, 2t + 9
//   a[1]: row g + 8, k 2t, 2t + 1      a[3]: row g + 8, k 2t + 8, 2t + 9
//   b0:   k 2t, 2t + 1,     column g   b1:   k 2t + 8, 2t + 9, column g
//   c[0], c[1]: row g, columns 2t, 2t + 1      c[2], c[3]: row g + 8, the same columns
__device__ __forceinline__ void mma_m16n8k16(float* c, const u32* a, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---------------------------------------------------------------------------------------- fast math

// NVRTC is called without --use_fast_math, so the fast instructions are named where they are used.

// 2^x; relative error about 2^-22; 0 below -126.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

// log2(x), absolute error about 2^-22.
__device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x; relative error about 2^-23; 1 / infinity = 0.
__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

// 1 / sqrt(x); relative error about 2^-22.
__device__ __forceinline__ float rsqrt_approx(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

// x / (1 + e^-x).
__device__ __forceinline__ float silu(float x) {
    const float log2_e = 1.4426950408889634f;
    return x * reciprocal_approx(1.0f + exp2_approx(-log2_e * x));
}

// x / 2 (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3), written as x / (1 + e^-2u): no cancellation for
// negative x, where 1 + tanh(u) is a small difference of large parts.
__device__ __forceinline__ float gelu_tanh(float x) {
    const float minus_two_sqrt_two_over_pi_log2_e = -2.3022081981f;
    const float exponent = minus_two_sqrt_two_over_pi_log2_e * x * (1.0f + 0.044715f * x * x);
    return x * reciprocal_approx(1.0f + exp2_approx(exponent));
}

// x / 2 (1 + erf(x / sqrt(2))). `erff` is built into nvcc and NVRTC, good to 2 units in the last place.
__device__ __forceinline__ float gelu_erf(float x) {
    return 0.5f * x * (1.0f + erff(0.70710678118654752f * x));
}

// ------------------------------------------------------------------------------------------- warps

// Sum over the 32 lanes, in every lane.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// Largest of the 32 lanes, in every lane.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
    return value;
}

// Transposes a 4x4 matrix of words that a quad of lanes holds one column a lane: before, lane q has word q of
// the blocks 0..3 in words[0..3]; after, it has the words 0..3 of block q. Its own inverse. All lanes must call.
//
// A tensor-core accumulator gives lane q of a quad the columns 2q, 2q + 1 of each block of 8. Packed to bf16 that
// is word q of every block; transposed, a lane owns a whole block, and reads or writes it with one 16-byte access.
__device__ __forceinline__ void quad_transpose(u32 (&words)[4]) {
    const bool odd = threadIdx.x & 1;
    u32 first = odd ? words[0] : words[1];
    u32 second = odd ? words[2] : words[3];
    first = __shfl_xor_sync(0xffffffffu, first, 1);
    second = __shfl_xor_sync(0xffffffffu, second, 1);
    if (odd) {
        words[0] = first;
        words[2] = second;
    } else {
        words[1] = first;
        words[3] = second;
    }

    const bool upper = threadIdx.x & 2;
    first = upper ? words[0] : words[2];
    second = upper ? words[1] : words[3];
    first = __shfl_xor_sync(0xffffffffu, first, 2);
    second = __shfl_xor_sync(0xffffffffu, second, 2);
    if (upper) {
        words[0] = first;
        words[1] = second;
    } else {
        words[2] = first;
        words[3] = second;
    }
}

#endif  // XRAY_KERNELS_COMMON
