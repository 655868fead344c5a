// Quantised weights in fragment order, and what the kernels over them share: unpacking, operands, epilogue.
//
// 16 rows of W are the tall side of mma m16n8k16. A piece is 16 rows x COLUMNS (64 of 4 bits, 32 of 8), 512 bytes: the A
// registers of every lane for 4 (2) mma in 16 bytes. Pieces are stored [N / 16][K / COLUMNS][lane][16 bytes]. With g = lane / 4,
// t = lane % 4, the k order inside 32 columns is permuted alike for W and X, k(j, h, e) = 32 (j / 2) + 8 t + 4 (j % 2) + 2 h + e,
// so that a lane's 16 bytes of X are the B registers of two mma:
//   4 bits: word j is mma j. Nibble r of its lower half is element e = 0 of register r, of its upper half e = 1; register r
//           holds row g + 8 (r % 2), h = r / 2. A level plus 8, as in the row-major words.
//   8 bits: words 2 j and 2 j + 1 are mma j. Bytes 0 to 3 of word 2 j + h: (row g, e 0), (row g + 8, e 0), (row g, e 1),
//           (row g + 8, e 1). Two's complement: the row-major byte, a level plus 128, with its highest bit flipped.
// Scales: 8 bits f32 [N]; 4 bits f16 [N / 16][K / GROUP][8][2], of rows g and g + 8. All tiles are whole rows of the row-major
// form's shape, so both forms are tensors of one shape.
//
// Configuration of every kernel that includes this: BITS 8 or 4, GROUP (32, 64, 128; 4 bits), WHOLE (K is a multiple of 128, else of
// 64), TILES (vectors / 8, rounded up), CHUNKS and SPLITS (below), WEIGHTS 1 to 3 (matrices of one input, rows counted on), GATE
// (two matrices: y = silu(first) * second), NORM, NEXT (below), BIAS, RESIDUAL, OUT_F32, ADAPTERS (adapter.cuh), OVERLAP (overlap.cuh).
//
// The order of a sum depends on the matrix alone, never on the number of vectors, so a vector's result is the same bit for bit
// alone and in company, in either kernel: K is cut into turns of 128 columns, the turns into CHUNKS contiguous chunks, each one sum
// on the tensor cores; the chunks of one of SPLITS equal parts are added in order, then the parts.
//
// Norms: an epilogue with NEXT also writes the stream times the next norm's weight, and of every 16 rows the sum of squares
// of the stream, [vectors][N / 16]. A kernel with NORM reads the former as X and multiplies its sums by 1 / rms from the latter.

#define TURN 128
#define PIECES (BITS == 8 ? 4 : 2)
#define COLUMNS (TURN / PIECES)
#define GROUPS (BITS == 8 ? 1 : TURN / GROUP)
#define MATRICES (GATE ? 2 : 1)

struct Parameters {
    u64 k;
    u64 rows[3];
    u64 batch;
    u64 epsilon;  // f32 bits
#if ADAPTERS
    AdapterPlace adapter;
#endif
};

// In this order, those that the configuration has.
#if BITS == 8
typedef float Scale;
#else
typedef u32 Scale;
#endif
#define KERNEL_OPERANDS \
    const u16* x, const uint4* words0, const Scale* scales0 \
    IF_TWO(const uint4* words1, const Scale* scales1) IF_THREE(const uint4* words2, const Scale* scales2) \
    IF_NORM(const float* squares) IF_BIAS(const u16* bias) IF_RESIDUAL(const u16* residual) \
    IF_ADAPTERS(const AdapterMatrix* adapters, const int* adapter_of, const float* low) IF_SPLIT(float* partial, u32* counters), Output* y \
    IF_NEXT(const u16* next_weight, u16* next_x, float* next_squares)
#if WEIGHTS > 1
#define IF_TWO(...) , __VA_ARGS__
#else
#define IF_TWO(...)
#endif
#if WEIGHTS > 2
#define IF_THREE(...) , __VA_ARGS__
#else
#define IF_THREE(...)
#endif
#if NORM
#define IF_NORM(...) , __VA_ARGS__
#else
#define IF_NORM(...)
#endif
#if BIAS
#define IF_BIAS(...) , __VA_ARGS__
#else
#define IF_BIAS(...)
#endif
#if RESIDUAL
#define IF_RESIDUAL(...) , __VA_ARGS__
#else
#define IF_RESIDUAL(...)
#endif
#if ADAPTERS
#define IF_ADAPTERS(...) , __VA_ARGS__
#else
#define IF_ADAPTERS(...)
#endif
#if SPLIT_BLOCKS
#define IF_SPLIT(...) , __VA_ARGS__
#else
#define IF_SPLIT(...)
#endif
#if NEXT
#define IF_NEXT(...) , __VA_ARGS__
#else
#define IF_NEXT(...)
#endif
#if OUT_F32
typedef float Output;
#else
typedef u16 Output;
#endif

__device__ __forceinline__ uint4 read_once(const uint4* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// (a & mask) | bits in one instruction: written in C it becomes two, since both constants are immediates.
__device__ __forceinline__ u32 and_or(u32 a, u32 mask, u32 bits) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(mask), "r"(bits));
    return r;
}

__device__ __forceinline__ u32 fma_bf16x2(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// The A registers of the two mma over 32 columns: words `low` and `high` of a piece. 0x4300 | n is 128 + n in bf16, exactly.
__device__ __forceinline__ void unpack(u32 low, u32 high, u32 (&a)[2][4]) {
#if BITS == 4
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const u32 shifted = and_or((j ? high : low) >> (4 * r), 0x000f000fu, 0x43004300u);
            a[j][r] = fma_bf16x2(shifted, 0x3f803f80u, 0xc308c308u);  // minus 136
        }
#endif
}
__device__ __forceinline__ void unpack(const uint4& words, u32 (&a)[2][4]) {
#if BITS == 8
    const u32 all[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
            // 128 + the low seven bits, minus 128, or 256 with the sign.
            const u32 word = all[2 * j + r / 2], bytes = r % 2 ? word >> 8 : word;
            a[j][r] = fma_bf16x2(and_or(bytes, 0x00800080u, 0x43004300u), 0xbf80bf80u, and_or(bytes, 0x007f007fu, 0x43004300u));
        }
#endif
}

__device__ __forceinline__ float half_to_float(u32 bits) {
    float value;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(value) : "r"(bits));
    return value;
}

// A turn of one tile of W: for 4 bits the sums of a group are scaled before they are added, for 8 bits a row's once at the end.
// `scale` gives the pair of scales of 32 columns.
template <int VECTORS, typename Pair>
__device__ __forceinline__ void multiply(const uint4 (&words)[PIECES], int q, const uint4 (&vectors)[VECTORS], float (&part)[VECTORS][4],
                                         float (&sums)[VECTORS][4], Pair pair) {
    u32 a[2][4];
#if BITS == 8
    unpack(words[q], a);
#pragma unroll
    for (int t = 0; t < VECTORS; t++) {
        mma(sums[t], a[0], vectors[t].x, vectors[t].y);
        mma(sums[t], a[1], vectors[t].z, vectors[t].w);
    }
#else
    const uint4& piece = words[q / 2];
    if (q % 2) unpack(piece.z, piece.w, a);
    else unpack(piece.x, piece.y, a);
    if (q * 32 % GROUP == 0) {
#pragma unroll
        for (int t = 0; t < VECTORS; t++) part[t][0] = part[t][1] = part[t][2] = part[t][3] = 0.f;
    }
#pragma unroll
    for (int t = 0; t < VECTORS; t++) {
        mma(part[t], a[0], vectors[t].x, vectors[t].y);
        mma(part[t], a[1], vectors[t].z, vectors[t].w);
    }
    if ((q + 1) * 32 % GROUP == 0) {
        const u32 scales = pair(q * 32 / GROUP);
        const float upper = half_to_float(scales), lower = half_to_float(scales >> 16);
#pragma unroll
        for (int t = 0; t < VECTORS; t++) {
            sums[t][0] += upper * part[t][0];
            sums[t][1] += upper * part[t][1];
            sums[t][2] += lower * part[t][2];
            sums[t][3] += lower * part[t][3];
        }
    }
#endif
}

// The matrix that a tile of the concatenated rows is in.
struct Place {
    const uint4* words;
    const Scale* scales;
    int which, tile;  // the tile inside the matrix
};

// 1 / rms of every vector, by all warps of a block: from the sums of squares of every 16 elements. A warp's vectors are summed
// together, so that their loads overlap; the order of a sum does not depend on how many there are.
template <int BLOCK>
__device__ __forceinline__ void norm_factors(const float* squares, float* factors, const Parameters& p) {
    constexpr int OWN = (TILES * 8 + BLOCK - 1) / BLOCK;
    const int parts = (int)p.k / 16, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const float* own[OWN];
    float sums[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        own[i] = squares + (u64)min(warp + i * BLOCK, (int)p.batch - 1) * parts;
        sums[i] = 0.f;
    }
#pragma unroll 8
    for (int part = lane; part < parts; part += 32)
#pragma unroll
        for (int i = 0; i < OWN; i++) sums[i] += own[i][part];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const float factor = rsqrtf(warp_sum(sums[i]) / (float)(int)p.k + __uint_as_float((u32)p.epsilon));
        if (lane == 0 && warp + i * BLOCK < TILES * 8) factors[warp + i * BLOCK] = factor;
    }
}

// What follows a sum.
struct Epilogue {
    int width;  // of the output
#if NORM
    const float* factors;  // in shared memory, a vector each
#endif
#if BIAS
    const u16* bias;
#endif
#if RESIDUAL
    const u16* residual;
#endif
#if ADAPTERS
    const AdapterMatrix* adapters;
    const int* adapter_of;
    const float* low;
#endif
    Output* y;
#if NEXT
    const u16* next_weight;
    u16* next_x;
    float* next_squares;
#endif

    // The sums of row `row` of the tile `tile` of the output become its element; `second` with GATE. Without what is added.
    __device__ __forceinline__ float finished(const Place& place, int row, int vector, float value, float second, const Scale* second_scales,
                                              const Parameters& p) const {
        const int within = place.tile * 16 + row;
#if BITS == 8
        value *= place.scales[within];
        if (GATE) second *= second_scales[within];
#endif
#if NORM
        value *= factors[vector];
        second *= factors[vector];
#endif
#if ADAPTERS
        if (adapter_of[vector] >= 0) {
            const AdapterMatrix* matrices = adapters + (u64)adapter_of[vector] * p.adapter.matrices + p.adapter.first;
            const float* lows = low + ((u64)vector * ADAPTER_SHARES + place.which) * ADAPTER_RANK;
            value = adapted(value, matrices[place.which], lows, within);
            if (GATE) second = adapted(second, matrices[1], lows + ADAPTER_RANK, within);
        }
#endif
        if (GATE) value = value / (1.f + __expf(-value)) * second;
        return value;
    }

    // A row a thread: a warp has the 16 rows of a tile for two vectors, row lane % 16. `use` is false past the end.
    __device__ __forceinline__ void store(bool use, const Place& place, int tile, int row, int vector, float value, float second,
                                          const Scale* second_scales, const Parameters& p) const {
        if (!NEXT && !use) return;
        float stored = 0.f;
        const u64 at = (u64)vector * width + tile * 16 + row;
        if (use) {
            value = finished(place, row, vector, value, second, second_scales, p);
#if BIAS
            value += bf16_to_float(bias[tile * 16 + row]);
#endif
#if RESIDUAL
            value += bf16_to_float(residual[at]);
#endif
#if OUT_F32
            y[at] = value;
#else
            y[at] = (u16)pack_bf16(value, 0.f);
#endif
            stored = rounded(value);
        }
#if NEXT
        float square = __fmul_rn(stored, stored);
        if (use) next_x[at] = (u16)pack_bf16(stored * bf16_to_float(next_weight[tile * 16 + row]), 0.f);
#pragma unroll
        for (int distance = 1; distance < 16; distance *= 2) square += __shfl_xor_sync(~0u, square, distance);
        if (use && row == 0) next_squares[(u64)vector * (width / 16) + tile] = square;
#endif
    }

    // The same with four rows a thread, row % 4 == 0: lanes of four have a tile's rows for one vector. `added` is the residual there.
    __device__ __forceinline__ void store_four(bool use, const Place& place, int tile, int row, int vector, const float (&values)[4],
                                               const float (&seconds)[4], uint2 added, const Scale* second_scales, const Parameters& p) const {
        if (!NEXT && !use) return;
        float stored[4] = {0.f, 0.f, 0.f, 0.f};
        const u64 at = (u64)vector * width + tile * 16 + row;
        if (use) {
            float value[4];
#pragma unroll
            for (int i = 0; i < 4; i++) value[i] = finished(place, row + i, vector, values[i], seconds[i], second_scales, p);
#if BIAS
#pragma unroll
            for (int i = 0; i < 4; i++) value[i] += bf16_to_float(bias[tile * 16 + row + i]);
#endif
#if RESIDUAL
            value[0] += low_half(added.x);
            value[1] += high_half(added.x);
            value[2] += low_half(added.y);
            value[3] += high_half(added.y);
#endif
            const u32 lower = pack_bf16(value[0], value[1]), upper = pack_bf16(value[2], value[3]);
#if OUT_F32
            *(float4*)(y + at) = make_float4(value[0], value[1], value[2], value[3]);
#else
            *(uint2*)(y + at) = make_uint2(lower, upper);
#endif
            stored[0] = low_half(lower);
            stored[1] = high_half(lower);
            stored[2] = low_half(upper);
            stored[3] = high_half(upper);
        }
#if NEXT
        if (use) {
            const uint2 weights = *(const uint2*)(next_weight + tile * 16 + row);
            *(uint2*)(next_x + at) = make_uint2(pack_bf16(stored[0] * low_half(weights.x), stored[1] * high_half(weights.x)),
                                                pack_bf16(stored[2] * low_half(weights.y), stored[3] * high_half(weights.y)));
        }
        // In the order of `store`.
        float square = __fmul_rn(stored[0], stored[0]) + __fmul_rn(stored[1], stored[1]);
        square += __fmul_rn(stored[2], stored[2]) + __fmul_rn(stored[3], stored[3]);
        square += __shfl_xor_sync(~0u, square, 1);
        square += __shfl_xor_sync(~0u, square, 2);
        if (use && row == 0) next_squares[(u64)vector * (width / 16) + tile] = square;
#endif
    }
};
