// RoPE: norm over each head where there is one, then rotation by the token's angles; forward and backward.
//
// x [tokens, heads, HEAD_DIM] with strides (elements) for tokens and heads, y and dx contiguous;
// cos, sin [tokens, HEAD_DIM] f32, both halves of a row alike. One warp a head: a lane holds PAIRS
// elements of the first half and their partners in the second.
//
// With SPLIT, x is a fused projection [tokens, 3, heads, HEAD_DIM]: queries and keys are rotated, values
// copied, and the three are contiguous in y, [3, tokens, heads, HEAD_DIM].
//
// Configuration: HEAD_DIM (even, at most 128), WITH_NORM, BACKWARD, SPLIT. Limit: memory.
// Source: Su et al. 2021, "RoFormer"; the norm over heads is that of Qwen3 (Henry et al. 2020, "Query-Key Normalization").
// On an H100 (Nsight Compute), of the memory's rate: backward over 5,888 tokens 76 % (32 heads) and 66 % (8); 368 tokens
// are 5.6 and 3.7 us, launch above all. SPLIT of 16 images: 39 %, with instructions at 77 %. 27 to 32 registers.

#define HALF (HEAD_DIM / 2)
#define PAIRS (HALF > 32 ? 2 : 1)

struct Parameters {
    u64 tokens, heads;
    u64 token_stride, head_stride;      // of x
    u64 dy_token_stride, dy_head_stride;
    u64 epsilon;  // f32 bits
};

extern "C" __global__ void __launch_bounds__(256)
ENTRY(const scalar* x, const scalar* weight, const float* cos_table, const float* sin_table,
#if BACKWARD
      const scalar* dy,
#endif
      scalar* out, const __grid_constant__ Parameters p) {
    const u64 head = (u64)blockIdx.x * 8 + (threadIdx.x >> 5);
    if (head >= p.tokens * p.heads * (SPLIT ? 3 : 1)) return;
    const int lane = threadIdx.x & 31;
    const u64 token = head / p.heads % p.tokens, index = head % p.heads;
    const scalar* from = x + token * p.token_stride + index * p.head_stride;
    const float* cosines = cos_table + token * HEAD_DIM;
    const float* sines = sin_table + token * HEAD_DIM;
    scalar* to = out + head * HEAD_DIM;
#if SPLIT
    const u64 part = head / (p.heads * p.tokens);
    from += part * p.heads * p.head_stride;
    if (part == 2) {
        for (int i = lane; i < HEAD_DIM; i += 32) to[i] = from[i];
        return;
    }
#endif

    float first[PAIRS], second[PAIRS];
#if WITH_NORM
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int at = lane * PAIRS + i;
        first[i] = at < HALF ? load(from + at) : 0.f;
        second[i] = at < HALF ? load(from + HALF + at) : 0.f;
        squares += first[i] * first[i] + second[i] * second[i];
    }
    const float scale = rsqrtf(warp_sum(squares) / HEAD_DIM + __uint_as_float((u32)p.epsilon));
#endif
#if !BACKWARD
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int at = lane * PAIRS + i;
        if (at >= HALF) continue;
#if WITH_NORM
        // Rounded where the plain operations round, so that both rotate the same values.
        const float a = rounded(rounded(first[i] * scale) * load(weight + at));
        const float b = rounded(rounded(second[i] * scale) * load(weight + HALF + at));
#else
        const float a = load(from + at), b = load(from + HALF + at);
#endif
        store(to + at, a * cosines[at] - b * sines[at]);
        store(to + HALF + at, b * cosines[at] + a * sines[at]);
    }
#else
    const scalar* gradient = dy + token * p.dy_token_stride + index * p.dy_head_stride;
    float rotated_first[PAIRS], rotated_second[PAIRS];
    float along = 0.f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int at = lane * PAIRS + i;
        rotated_first[i] = rotated_second[i] = 0.f;
        if (at >= HALF) continue;
        const float a = load(gradient + at), b = load(gradient + HALF + at);
        rotated_first[i] = a * cosines[at] + b * sines[at];
        rotated_second[i] = b * cosines[at] - a * sines[at];
#if WITH_NORM
        rotated_first[i] *= load(weight + at);
        rotated_second[i] *= load(weight + HALF + at);
        along += rotated_first[i] * first[i] + rotated_second[i] * second[i];
#endif
    }
#if WITH_NORM
    along = warp_sum(along) / HEAD_DIM * scale * scale;
#endif
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int at = lane * PAIRS + i;
        if (at >= HALF) continue;
#if WITH_NORM
        store(to + at, (rotated_first[i] - first[i] * along) * scale);
        store(to + HALF + at, (rotated_second[i] - second[i] * along) * scale);
#else
        store(to + at, rotated_first[i]);
        store(to + HALF + at, rotated_second[i]);
#endif
    }
#endif
}
